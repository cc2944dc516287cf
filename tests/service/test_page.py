"""The page is open to all and nothing else is; no other file can be reached, and the page loads its own files alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service import edge, page_files
from service.page_files import PAGE_FOLDER
from service.routes import page
from tests.service.edges import call, make_edge

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
KEY = "a-client-key-for-tests"
SHIPPED = {f"/ui/{file.relative_to(PAGE_FOLDER).as_posix()}" for file in PAGE_FOLDER.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A page of three files, among others that are not to be served."""
    folder = tmp_path / "ui"
    (folder / "js").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>a page</title>")
    (folder / "style.css").write_text("main { color: green }")
    (folder / "js" / "app.js").write_text("export const one = 1;\n")
    (folder / "favicon.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "notes.txt").write_text("confidential")
    (folder / ".hidden.js").write_text("confidential")
    (tmp_path / "secret.js").write_text("confidential")
    (folder / "linked.js").symlink_to(tmp_path / "secret.js")
    (folder / "linked").symlink_to(tmp_path)
    return folder


@pytest.fixture
def small(folder: Path) -> TestClient:
    app = FastAPI()
    app.include_router(page.make_router(folder))
    return TestClient(app)


FILES = {
    "/": "text/html; charset=utf-8",
    "/ui/index.html": "text/html; charset=utf-8",
    "/ui/style.css": "text/css; charset=utf-8",
    "/ui/js/app.js": "text/javascript; charset=utf-8",
    "/ui/favicon.svg": "image/svg+xml",
}


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_sent_as_what_it_is_under_the_pages_policy(small: TestClient, folder: Path, path: str) -> None:
    file = folder / (path.removeprefix("/ui/").removeprefix("/") or "index.html")
    response = small.get(path)
    assert (response.status_code, response.content) == (200, file.read_bytes())
    assert response.headers["content-type"] == FILES[path]
    assert response.headers["content-security-policy"] == POLICY
    head = small.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert dict(head.headers) == dict(response.headers)
    assert small.post(path).status_code == 405


def test_the_list_of_open_paths_is_that_of_the_files(folder: Path) -> None:
    assert page_files.page_paths(folder) == set(page_files.page_files(folder)) == set(FILES)
    assert page_files.page_paths(folder / "nowhere") == frozenset()


@pytest.mark.parametrize(
    "path",
    [
        "/ui",
        "/ui/",
        "/ui/js",
        "/ui/js/",
        "/ui//index.html",
        "/ui/notes.txt",
        "/ui/.hidden.js",
        "/ui/linked.js",
        "/ui/linked/secret.js",
        "/ui/../secret.js",
        "/ui/js/../index.html",
        "/ui/%2e%2e/secret.js",
        "/ui/..%2fsecret.js",
        "/ui/%2fetc%2fpasswd",
        "/ui//etc/passwd",
        "/ui/..%5csecret.js",
        "/ui/index.html%00.js",
        "/ui/INDEX.HTML",
        "/index.html",
    ],
)
def test_nothing_but_the_listed_files_can_be_reached(small: TestClient, path: str) -> None:
    # As a server hands it on: a client would tidy the path.
    answer = asyncio.run(call(small.app, "GET", unquote(path)))
    assert answer.status in (307, 404)  # 307: to the same path without its last slash, which is not there either
    assert answer.body in (b"", b'{"detail":"Not Found"}')


def test_a_file_that_comes_later_is_not_served(small: TestClient, folder: Path) -> None:
    (folder / "late.js").write_text("late")
    (folder / "style.css").write_text("changed")
    assert small.get("/ui/late.js").status_code == 404
    assert small.get("/ui/style.css").text == "main { color: green }"


# ---- on the server -----------------------------------------------------------------------------------------------


def test_the_shipped_page_is_open_without_a_key_and_nothing_else_is(make_app: Callable[..., Any]) -> None:
    assert {"/ui/index.html", "/ui/style.css"} <= SHIPPED
    with TestClient(make_app(api_keys=KEY, rate_limit="1/hour")) as client:
        for path in sorted({"/", *SHIPPED}):
            response = client.get(path)
            assert response.status_code == 200, path
            assert response.headers["content-security-policy"] == POLICY
            assert response.headers["cache-control"] == "no-store"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["x-frame-options"] == "DENY"
            assert "x-ratelimit-limit-requests" not in response.headers
            assert client.head(path).status_code == 200
        for path in ("/ui", "/ui/", "/ui/nothing.js", "/v1/about", "/v1/stats", "/v1/features", "/openapi.json"):
            assert client.get(path).status_code == 401, path
        assert client.get("/ui/nothing.js", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


def test_an_unknown_file_is_not_found_in_the_shape_of_all_errors(client: TestClient) -> None:
    response = client.get("/ui/nothing.js")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_the_page_is_no_part_of_the_apis_description(client: TestClient) -> None:
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or path.startswith("/ui")]


def test_a_page_of_another_site_cannot_load_it(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403


def test_open_paths_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "page_paths", lambda: frozenset({"/", "/ui/app.js"}))
    server = make_edge(api_keys=KEY)
    assert server.get("/ui/app.js").status == 200
    for path in ("/ui/app.js/", "/ui/app.jsx", "//", "/ui/APP.js", "/ui/../ui/app.js", "/v1/models"):
        assert server.get(path).status == 401, path

"""`/admin/spool`: every item once, marks only added, for administrators alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.spool import Spool
from tests.feature_bank.test_spool import item

KEY, CLIENT_KEY = "an-admin-key-for-tests", "a-client-key-for-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
URL = "/admin/spool"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def start(make_app: Callable[..., Any], path: Path) -> Iterator[Callable[..., TestClient]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            app = make_app(**{"spool": path, "api_keys": CLIENT_KEY, "admin_keys": KEY, **settings})
            return stack.enter_context(TestClient(app, headers=ADMIN))

        yield make


def fill(path: Path, *items: Any) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add(items)


def test_pages_show_every_item_once_the_newest_first(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    fill(path, *(item(f"r{number}") for number in range(9)))
    found: list[dict[str, Any]] = []
    before: dict[str, int] = {}
    while data := client.get(URL, params={"limit": 4, **before}).json()["data"]:
        found += data
        before = {"before": data[-1]["id"]}
    assert [one["request_id"] for one in found] == [f"r{number}" for number in reversed(range(9))]
    assert found[0]["flagged"] == ["violence"]
    assert found[0]["marks"] == []
    assert "acts" not in found[0]


def test_items_are_chosen(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    fill(path, item("a"), item("b", phase="response", choice=2, why="verdict"), item("b", flagged=()))

    def chosen(**params: Any) -> list[int]:
        return [one["id"] for one in client.get(URL, params=params).json()["data"]]

    assert chosen(request_id="b") == [3, 2]
    assert chosen(request_id="b", phase="response", choice=2) == [2]
    assert chosen(why="sampled", flagged="violence") == [1]
    client.post(f"{URL}/3/marks", json={"domain": "violence", "mark": "miss", "reviewer": "Ann"})
    assert chosen(marked=True) == [3]
    assert chosen(marked=False) == [2, 1]


def test_marks_are_added_and_shown_in_their_order(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    fill(path, item())
    for mark in ("false_positive", "correct"):
        body = {"domain": "violence", "mark": mark, "reviewer": "Ann", "reason": "a film"}
        answer = client.post(f"{URL}/1/marks", json=body)
        assert answer.status_code == 200, answer.text
        shown = answer.json()["mark"]
        assert {name: shown[name] for name in body} == body
        assert shown["item"] == 1
    (one,) = client.get(URL).json()["data"]
    assert [mark["mark"] for mark in one["marks"]] == ["false_positive", "correct"]
    with Spool.open_for_reading(path) as spool:
        assert [labels for _, labels in spool.marked()] == [{"violence": True}]


@pytest.mark.parametrize(
    ("number", "body", "status", "code"),
    [
        (9, {}, 404, "item_not_found"),
        (1, {"domain": "weather"}, 404, "domain_not_found"),
        (1, {"mark": "maybe"}, 400, None),
        (1, {"reviewer": "  "}, 400, None),
        (1, {"more": 1}, 400, None),
        (0, {}, 400, None),
    ],
)
def test_a_mark_that_says_nothing_is_refused(
    start: Callable[..., TestClient], path: Path, number: int, body: Any, status: int, code: str | None
) -> None:
    client = start()
    fill(path, item())
    given = {"domain": "violence", "mark": "miss", "reviewer": "Ann", **body}
    answer = client.post(f"{URL}/{number}/marks", json=given)
    assert answer.status_code == status, answer.text
    assert code is None or answer.json()["error"]["code"] == code
    with Spool.open_for_reading(path) as spool:
        assert spool.marks(1) == []


def test_only_administrators_get_there(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    other = {"Authorization": f"Bearer {CLIENT_KEY}"}
    assert client.get(URL, headers=other).status_code == 403
    body = {"domain": "violence", "mark": "miss", "reviewer": "Ann"}
    assert client.post(f"{URL}/1/marks", json=body, headers=other).status_code == 403


def test_a_server_without_a_spool_says_so(start: Callable[..., TestClient]) -> None:
    answer = start(spool=None).get(URL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_spool")


def test_a_file_that_is_damaged_is_a_conflict(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    path.write_bytes(b"not a database")
    answer = client.get(URL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "spool_not_usable")


def test_a_mark_makes_no_file_where_there_is_none(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    path.rename(path.with_name("elsewhere.db"))
    body = {"domain": "violence", "mark": "miss", "reviewer": "Ann"}
    for answer in (client.post(f"{URL}/1/marks", json=body), client.get(URL)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "spool_not_usable")
        assert "does not exist" in answer.json()["error"]["message"]
    assert not path.exists()

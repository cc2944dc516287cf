"""What surrounds the views: the page asks for nothing but its own server, and its key stays in the tab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser import Tab

pytestmark = pytest.mark.browser

VIEWS = ("playground", "explorer", "monitor", "compare")
CSP = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}


def test_every_file_of_the_page_comes_with_the_strict_policy_and_from_its_own_server(
    serve: Callable[..., str], visit: Any, tab: Tab
) -> None:
    url = serve()
    for view in VIEWS:
        visit(url, view)
        tab.page.wait_for_load_state("networkidle") if view != "monitor" else tab.page.wait_for_timeout(500)
    assert tab.outside(url) == set()
    files = {address for address in tab.requests if address == f"{url}/" or "/ui/" in address}
    assert len(files) > 10
    for address in files:
        answer = httpx.get(address)
        assert {part.strip() for part in answer.headers["Content-Security-Policy"].split(";")} == CSP
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_header_leads_to_the_views_and_says_what_is_served(serve: Callable[..., str], visit: Any) -> None:
    page = visit(serve())
    for view in VIEWS:
        link = page.locator(f"#views a[data-view={view}]")
        link.click()
        expect(page.locator(f"main .view-{view}")).to_be_visible()
        expect(link).to_have_attribute("aria-current", "page")
        assert page.evaluate("location.hash").startswith(f"#/{view}")
    page.go_back()
    expect(page.locator("main .view-monitor")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("tiny-guarded")


def test_the_theme_is_kept_from_page_to_page(serve: Callable[..., str], visit: Any) -> None:
    url = serve()
    page = visit(url)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for _ in ("light", "dark"):
        page.get_by_role("button", name="Theme").click()
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
    page = visit(url, "compare")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after


def test_a_key_is_asked_for_a_wrong_one_is_told_and_it_stays_in_the_tab(
    serve: Callable[..., str], keyed: dict[str, Any], tab: Tab
) -> None:
    tab.expected = ["401"]
    url = serve(**keyed)
    page = tab.page
    tab.goto(f"{url}/#/explorer")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("API key").fill("no-such-key")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog.get_by_role("alert")).to_contain_text("not accepted")
    dialog.get_by_label("API key").fill("key-of-an-admin")
    page.keyboard.press("Enter")
    page.locator("main .view-explorer").wait_for()
    expect(dialog).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("the-admin")
    stored = page.evaluate("JSON.stringify({...localStorage}) + document.cookie + location.href")
    assert "key-of" not in stored
    assert [address for address in tab.requests if "key-of" in address or "no-such" in address] == []
    page.reload()
    page.locator("main .view-explorer").wait_for()
    expect(dialog).to_be_hidden()


def test_a_server_that_is_away_is_told_and_asked_again(restartable: Any, tab: Tab) -> None:
    tab.expected = ["ERR_", "net::", "503"]
    server = restartable()
    url = server.start()
    tab.page.route("**/v1/about", lambda route: route.abort())
    tab.goto(url)
    again = tab.page.get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    tab.page.unroute("**/v1/about")
    again.click()
    tab.page.locator("main .view-playground").wait_for()

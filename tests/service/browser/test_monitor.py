"""The monitor: verdicts are seen as they come, and one leads back to the text that it is about."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from feature_bank.spool import Spool
from tests.service.browser.conftest import KEYS

pytestmark = pytest.mark.browser


@pytest.fixture
def url(serve: Callable[..., str], tmp_path: Path) -> str:
    """A server without keys that keeps texts."""
    return serve(audit=tmp_path / "audit.sqlite", audit_text=True)


@pytest.fixture
def keyed_url(serve: Callable[..., str], keyed: dict[str, Any], tmp_path: Path) -> str:
    return serve(audit=tmp_path / "audit.sqlite", audit_text=True, **keyed)


def judge(url: str, text: str, role: str = "admin") -> None:
    """Have a text judged through the API; it gets a verdict for each domain that it names."""
    headers = {"Authorization": f"Bearer {KEYS[role]}"}
    assert httpx.post(f"{url}/v1/moderations", json={"input": text}, headers=headers).status_code == 200


def events(page: Page) -> Locator:
    return page.locator("ol.events > li[data-action]:not([hidden])")


def live(page: Page) -> None:
    expect(page.locator(".stream-state")).to_have_attribute("data-state", "live")


def test_a_verdict_of_the_api_appears_by_itself(url: str, visit: Any) -> None:
    page = visit(url, "monitor")
    live(page)
    judge(url, "a sentence about violence")
    event = events(page).first
    expect(event).to_have_attribute("data-domain", "violence")
    expect(event).to_have_attribute("data-action", "block")
    expect(event).to_have_attribute("data-endpoint", "moderations")
    event.locator("button.event").click()
    expect(event.locator(".event-detail")).to_contain_text("L15/7")
    expect(page.locator("figure.rate[data-domain=violence] .reading")).to_contain_text("1 block")
    expect(page.locator("[data-tile=blocked] dd.value")).to_have_text("1")


def test_events_are_filtered_and_the_address_keeps_it(url: str, visit: Any) -> None:
    page = visit(url, "monitor")
    live(page)
    for text in ("violence here", "terror there", "politics and violence"):
        judge(url, text)
    expect(events(page)).to_have_count(4)
    page.get_by_role("combobox", name="domain").select_option("violence")
    expect(events(page)).to_have_count(2)
    page.get_by_role("combobox", name="action").select_option("flag")
    expect(events(page)).to_have_count(0)
    page.get_by_role("combobox", name="action").select_option("block")
    assert "domain=violence" in page.evaluate("location.hash")
    page.reload()
    live(page)
    expect(page.get_by_role("combobox", name="domain")).to_have_value("violence")
    judge(url, "terror again")
    judge(url, "violence again")
    expect(events(page).first).to_have_attribute("data-domain", "violence")
    expect(page.locator("ol.events > li[data-domain=terror]:not([hidden])")).to_have_count(0)


def test_what_comes_during_a_pause_waits_for_its_end(url: str, visit: Any) -> None:
    page = visit(url, "monitor")
    live(page)
    judge(url, "violence first")
    expect(events(page)).to_have_count(1)
    pause = page.locator("button[data-act=pause]")
    pause.click()
    judge(url, "violence second")
    expect(pause).to_contain_text("1 new")
    expect(events(page)).to_have_count(1)
    pause.click()
    expect(events(page)).to_have_count(2)


def test_a_verdict_opens_the_trace_of_its_text_in_the_playground(
    keyed_url: str, visit: Any, sign_in: Callable[[str], None]
) -> None:
    sign_in("admin")
    page = visit(keyed_url, "monitor")
    live(page)
    text = "two <i>words</i> about violence, and ﷽ a third"
    judge(keyed_url, text)
    events(page).first.locator("button.event").click()
    page.get_by_role("button", name="Open its trace").click()
    page.locator("main .view-playground").wait_for()
    expect(page.get_by_role("textbox", name="Text", exact=True)).to_have_value(text)
    assert "violence" not in page.evaluate("location.href")
    assert page.evaluate("sessionStorage.getItem('sailguard-handover')") is None


def test_earlier_verdicts_and_top_features_are_there_when_an_admin_comes(
    keyed_url: str, visit: Any, sign_in: Callable[[str], None]
) -> None:
    for _ in range(3):
        judge(keyed_url, "violence before")
    sign_in("admin")
    page = visit(keyed_url, "monitor")
    expect(page.locator("figure.rate[data-domain=violence] .reading")).to_contain_text("3 block")
    top = page.locator("ol.top-features > li[data-feature]").first
    expect(top).to_have_attribute("data-feature", "L15/7")
    expect(top.locator(".num")).to_contain_text("3")
    expect(page.locator("[data-tile=blocked] dd.value")).to_have_text("3")


def test_the_stream_comes_back_after_the_server_was_started_again(
    restartable: Callable[..., Any], visit: Any, tab: Any
) -> None:
    tab.expected = ["net::", "ERR_"]
    server = restartable()
    page = visit(server.start(), "monitor")
    live(page)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    expect(page.locator(".stream-state")).to_have_attribute("data-state", "reconnecting")
    stopping.join()
    url = server.start()
    again = page.get_by_role("button", name="Connect now")
    if again.is_visible():
        again.click()
    live(page)
    judge(url, "violence after")
    expect(events(page).first).to_have_attribute("data-domain", "violence")


def test_a_table_says_what_the_charts_show(url: str, visit: Any) -> None:
    page = visit(url, "monitor")
    live(page)
    judge(url, "violence and terror")
    expect(page.locator("figure.rate[data-domain=terror] .reading")).to_contain_text("1 block")
    page.get_by_role("button", name="Table", exact=True).click()
    table = page.get_by_role("region", name="Verdicts over time, as a table").get_by_role("table")
    expect(table).to_be_visible()
    page.get_by_role("button", name="60 min").click()
    expect(page.get_by_role("button", name="60 min")).to_have_attribute("aria-pressed", "true")
    assert "range=60" in page.evaluate("location.hash")


def test_a_verdict_is_marked_with_its_reviewers_name(
    serve: Callable[..., str], keyed: dict[str, Any], visit: Any, sign_in: Callable[[str], None], tmp_path: Path
) -> None:
    file = tmp_path / "spool.db"
    url = serve(spool=file, spool_share=0.0, **keyed)
    sign_in("admin")
    page = visit(url, "monitor")
    live(page)
    body = {"input": "a sentence about violence", "role": "response"}
    assert httpx.post(
        f"{url}/v1/moderations", json=body, headers={"Authorization": f"Bearer {KEYS['admin']}"}
    ).is_success
    events(page).first.locator("button.event").click()
    bar = events(page).first.locator(".event-marks")
    bar.get_by_role("button", name="False positive").click()
    expect(bar.locator("[data-marked]")).to_contain_text("Say who you are")
    bar.get_by_role("textbox", name="Your name").fill("Ada <b>")
    bar.get_by_role("button", name="False positive").click()
    expect(bar.locator("[data-marked]")).to_contain_text("Marked by Ada <b>: violence, false positive.")
    bar.get_by_role("combobox", name="Domain that was missed").select_option("terror")
    bar.get_by_role("button", name="Missed").click()
    expect(bar.locator("[data-marked]")).to_contain_text("terror, missed")
    assert page.evaluate("localStorage.getItem('sailguard-reviewer')") == "Ada <b>"
    with Spool.open_for_reading(file) as spool:
        assert [labels for _, labels in spool.marked()] == [{"violence": False, "terror": True}]
        assert {mark.reviewer for mark in spool.marks(1)} == {"Ada <b>"}


def test_without_a_spool_or_a_key_for_it_there_is_nothing_to_mark_with(
    serve: Callable[..., str], visit: Any, tmp_path: Path
) -> None:
    url = serve(spool=tmp_path / "spool.db")
    page = visit(url, "monitor")
    live(page)
    judge(url, "a sentence about violence")
    events(page).first.locator("button.event").click()
    expect(events(page).first.locator(".event-detail")).to_contain_text("L15/7")
    expect(page.locator(".event-marks")).to_have_count(0)

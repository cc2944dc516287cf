"""Every view can be read and used by everyone: in light and dark, on a phone, by keyboard, and with a screen reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.service.browser.conftest import WIDE
from tests.service.browser.driving import ended, flow_of, read

pytestmark = pytest.mark.browser

NARROW = {"width": 390, "height": 844}
VIEWS = ("playground", "explorer", "monitor", "compare")


@pytest.fixture
def url(serve: Callable[..., str], tmp_path: Path) -> str:
    return serve(audit=tmp_path / "audit.sqlite", audit_text=True)


def fill(page: Page, url: str, view: str) -> None:
    """Show the view with something in it."""
    page.locator(f"main .view-{view}").wait_for()
    if view == "playground":
        read(page, "a sentence about violence, of several words")
        turn = ended(page)
        turn.locator(".verdict").first.get_by_role("button").first.click()
        flow_of(turn).locator(".tok").nth(2).click()
        page.locator("#pg-token tr[data-feature]").first.get_by_role("button", name="Pin").click()
    elif view == "explorer":
        page.locator("[role=option]").first.wait_for()
    elif view == "monitor":
        expect(page.locator(".stream-state")).to_have_attribute("data-state", "live")
        httpx.post(f"{url}/v1/moderations", json={"input": "violence and terror"})
        page.locator("ol.events > li[data-action] button.event").first.click()
    else:
        page.get_by_role("textbox", name="Texts", exact=True).fill("a word on violence\na word on bees")
        page.locator("button[data-act=compare]").click()
        page.locator("tr.text-row button.opener").first.click()


def serious(page: Page) -> list[str]:
    """What axe finds that keeps somebody out."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']} ({one['impact']}): {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_no_serious_violation_and_fits_its_window(
    url: str, new_tab: Any, view: str, size: dict[str, int], scheme: str
) -> None:
    tab = new_tab(viewport=size, color_scheme=scheme)
    tab.goto(f"{url}/#/{view}")
    fill(tab.page, url, view)
    assert serious(tab.page) == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert tab.page.locator("h1").count() == 1


CONTROLS = """() => {
  const shown = (e) => e.checkVisibility() && e.getClientRects().length > 0;
  const kinds = "main button, main input, main select, main textarea, main a[href], nav a";
  const wanted = [...document.querySelectorAll(kinds)].filter((e) =>
    !e.disabled && e.tabIndex >= 0 && shown(e) && e.type !== "radio" && !e.closest("details:not([open])"));
  window.wanted = new Set(wanted);
  return wanted.length;
}"""

# Of a list the option that the keys would choose shows where one is
UNSEEN = """() => {
  const e = document.activeElement;
  window.wanted.delete(e);
  const option = document.getElementById(e.getAttribute("aria-activedescendant"));
  const seen = [e, option].filter(Boolean).map((one) => getComputedStyle(one)).some((style) =>
    style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 || style.boxShadow !== "none");
  return e === document.body || seen ? [] : [e.outerHTML.slice(0, 120)];
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_every_control_is_reached_with_the_tab_key_and_seen(url: str, visit: Any, view: str) -> None:
    page = visit(url, view)
    fill(page, url, view)
    wanted = page.evaluate(CONTROLS)
    assert wanted > 5
    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
    unseen = []
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        unseen += page.evaluate(UNSEEN)
        if page.evaluate("window.wanted.size === 0"):
            break
    assert page.evaluate("[...window.wanted].map((e) => e.outerHTML.slice(0, 120))") == []
    assert unseen == []


def test_the_content_is_one_key_away(url: str, visit: Any) -> None:
    page = visit(url, "explorer")
    page.keyboard.press("Tab")
    skip = page.get_by_role("button", name="Skip to content")
    expect(skip).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()


def test_what_happens_is_said(url: str, visit: Any) -> None:
    page = visit(url)
    page.evaluate(
        """() => { window.said = []; const live = document.getElementById("live");
          new MutationObserver(() => window.said.push(live.textContent))
            .observe(live, {childList: true, characterData: true, subtree: true}); }"""
    )
    read(page, "a sentence about violence")
    ended(page)
    page.wait_for_timeout(300)
    said = [line for line in page.evaluate("window.said") if line]
    assert said
    assert len(said) < 8  # sparingly: not every token

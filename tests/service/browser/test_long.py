"""A text of thousands of tokens is shown, scrolled and walked through without a layout for every token."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.service.browser.driving import flow_of, read, tokens

pytestmark = pytest.mark.browser

SENTENCE = "The olive tree has been grown around the inner sea for some six thousand years. "
PARAGRAPH = 8 * SENTENCE + "\n"
LONG = 180_000  # milliseconds


def walk(page: Page, text: str, least: int) -> Locator:
    """Read `text`, scroll to its end, and go on by keyboard there. Returns its flow."""
    page.evaluate(
        """() => { window.longest = 0; new PerformanceObserver((list) => { for (const task of list.getEntries())
          window.longest = Math.max(window.longest, task.duration); }).observe({type: "longtask", buffered: true}); }"""
    )
    read(page, text)
    turn = page.locator("section.pg-turn")
    expect(turn).to_have_attribute("data-state", "done", timeout=LONG)
    flow = flow_of(turn)
    found = tokens(flow)
    assert len(found) >= least
    assert "".join(found) == text
    last = flow.locator(".tok").last
    last.scroll_into_view_if_needed()
    last.click()
    expect(last).to_have_attribute("aria-current", "true")
    page.keyboard.press("ArrowLeft")
    expect(flow.locator(".tok").nth(len(found) - 2)).to_have_attribute("aria-current", "true")
    expect(page.locator("#pg-token tr[data-feature]").first).to_be_visible()
    page.keyboard.press("Home")
    expect(page.locator(".tok[aria-current=true]")).to_have_count(1)
    assert page.evaluate("window.longest") < 2000
    return flow


def test_five_thousand_words_without_a_line_break_are_walked_through(serve: Any, visit: Any) -> None:
    page = visit(serve())
    walk(page, 340 * SENTENCE, 5000)


@pytest.mark.slow
def test_four_thousand_tokens_of_the_embedded_model_stand_in_chunks(real: str, visit: Any) -> None:
    page = visit(real)
    flow = walk(page, 32 * PARAGRAPH, 4000)
    # The browser lays out a chunk only as it comes into view
    chunks = flow.evaluate(
        """(flow) => [...flow.querySelectorAll("*")].filter((e) => getComputedStyle(e).contentVisibility === "auto")
          .map((e) => e.querySelectorAll(".tok").length)"""
    )
    assert sum(chunks) == flow.locator(".tok").count()
    assert max(chunks) <= 600
    assert len(chunks) >= 7

"""Steering in the playground: two answers side by side from one seed, of which one is the answer without steering."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import Tab
from tests.service.browser.driving import ended, flow_of, posted, send, tokens

pytestmark = pytest.mark.browser

TREE = "Tell me about the history of the olive tree."
SEED = 5


def add_target(page: Page, name: str) -> None:
    """Choose what is steered as a person does: by typing its name."""
    page.get_by_role("tab", name="Steering").click()
    page.get_by_role("combobox", name="Add a target").fill(name)
    page.locator("#pg-steering").get_by_role("option", name=name).first.click()
    expect(page.locator(f".pg-target[data-target='{name}']")).to_be_visible()


def test_the_two_columns_differ_and_the_plain_one_is_the_answer_without_steering(real: str, visit: Any) -> None:
    page = visit(real)
    send(page, TREE, max_tokens=16, seed=SEED)
    free = tokens(flow_of(ended(page)), "response")
    page.get_by_role("button", name="New", exact=True).click()
    add_target(page, "politics")
    target = page.locator(".pg-target[data-target=politics]")
    slider = target.get_by_role("slider")
    slider.focus()
    page.keyboard.press("End")
    assert (target.get_attribute("data-steer") or "").startswith("politics=")
    expect(page.get_by_role("tab", name="Steering 1")).to_be_visible()
    page.get_by_role("checkbox", name="Compare").set_checked(True)
    send(page, TREE, max_tokens=16, seed=SEED)
    turn = ended(page)
    plain, steered = (tokens(flow_of(turn, run), "response") for run in ("plain", "steered"))
    assert plain == free
    assert steered != plain
    expect(turn.locator(".pg-comparison")).to_be_visible()
    left, right = (flow_of(turn, run).bounding_box() for run in ("plain", "steered"))
    assert left is not None
    assert right is not None
    assert left["x"] + left["width"] <= right["x"]


def test_a_target_is_switched_off_and_removed_and_a_link_keeps_it(
    real: str, visit: Any, tab: Tab, new_tab: Any
) -> None:
    page = visit(real)
    add_target(page, "violence")
    target = page.locator(".pg-target[data-target=violence]")
    send(page, TREE, max_tokens=4, seed=SEED)
    ended(page)
    steer = target.get_attribute("data-steer")
    other = new_tab()
    other.goto(page.evaluate("location.href"))
    other.page.get_by_role("tab", name="Steering").click()
    expect(other.page.locator(".pg-target[data-target=violence]")).to_have_attribute("data-steer", steer or "")
    assert posted(other) == []
    target.get_by_role("checkbox").set_checked(False)
    send(page, TREE, max_tokens=4, seed=SEED)
    turn = ended(page)
    expect(turn.locator(".pg-flow")).to_have_count(1)
    target.get_by_role("button", name="Remove").click()
    expect(page.locator(".pg-target")).to_have_count(0)


def test_a_feature_of_the_explorer_is_steered_by_a_link(real: str, visit: Any, tab: Tab) -> None:
    page = visit(real, "explorer")
    page.locator("article[data-card]").wait_for()
    feature = page.locator("article[data-card]").first.get_attribute("data-card")
    page.get_by_role("link", name="Steer with it").click()
    expect(page.locator("main .view-playground")).to_be_visible()
    expect(page.locator(f".pg-target[data-target='{feature}']")).to_be_visible()
    assert posted(tab) == []

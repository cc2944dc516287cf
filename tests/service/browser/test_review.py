"""Reviewing by keyboard: what is decided lands in the bank's own log, once, in order, and stays there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from feature_bank.review import load_reviews
from tests.service.browser.driving import remember

pytestmark = pytest.mark.browser

REVIEWER = "A. Reader"


@pytest.fixture
def url(serve: Callable[..., str], keyed: dict[str, Any], bank_copy: Path) -> str:
    return serve(bank=bank_copy, **keyed)


@pytest.fixture
def reviewing(url: str, visit: Any, sign_in: Callable[[str], None], tab: Any) -> Page:
    """The explorer, for an admin who has given a name before."""
    sign_in("admin")
    remember(tab.page, "localStorage", "sailguard-reviewer", REVIEWER)
    page: Page = visit(url, "explorer", sort="id")
    page.locator("[role=option]").first.wait_for()
    page.locator("article[data-card]").wait_for()
    return page


def logged(bank: Path, number: int) -> list[Any]:
    """The reviews, once there are so many."""
    deadline = time.monotonic() + 30
    while len(found := load_reviews(bank).reviews) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} reviews were kept"
        time.sleep(0.05)
    return list(found)


def current(page: Page) -> str:
    return str(page.locator("[role=option][aria-selected=true]").get_attribute("data-feature"))


def stay(page: Page) -> None:
    """Do not go on to the next feature by itself."""
    page.get_by_role("checkbox", name="Go on by itself").set_checked(False)
    page.locator("h2").first.click()


def test_a_feature_is_accepted_by_one_key_and_the_next_one_comes(reviewing: Page, bank_copy: Path) -> None:
    first = current(reviewing)
    reviewing.keyboard.press("a")
    expect(reviewing.locator(f"[role=option][data-feature='{first}']")).to_have_attribute("data-status", "accepted")
    expect(reviewing.locator("[role=option][aria-selected=true]")).not_to_have_attribute("data-feature", first)
    (review,) = logged(bank_copy, 1)
    assert (review.feature, review.verdict, review.reviewer) == (first, "accept", REVIEWER)


def test_reject_relabel_and_note_are_kept_with_what_was_typed(reviewing: Page, bank_copy: Path) -> None:
    page = reviewing
    stay(page)
    feature = current(page)
    card = page.locator(f"article[data-card='{feature}']")
    page.keyboard.press("r")
    form = page.locator("form[data-form=reject]")
    form.get_by_role("textbox", name="In your words").fill("it fires on <b>commas</b>, a great deal")
    page.keyboard.press("Enter")
    expect(card.locator("[data-verdict]")).to_have_attribute("data-verdict", "rejected")
    page.locator("h2").first.click()
    page.keyboard.press("e")
    form = page.locator("form[data-form=relabel]")
    form.get_by_role("textbox", name="Explanation").fill("lists of measures")
    page.keyboard.press("Control+Enter")
    expect(card).to_contain_text("lists of measures")
    page.locator("h2").first.click()
    page.keyboard.press("n")
    page.locator("form[data-form=note]").get_by_role("textbox", name="Note").fill("seen twice: 注 ملاحظة")
    page.keyboard.press("Enter")
    reviews = logged(bank_copy, 3)
    assert [(review.feature, review.verdict) for review in reviews] == [
        (feature, "reject"),
        (feature, "relabel"),
        (feature, "note"),
    ]
    assert reviews[0].reason == "it fires on <b>commas</b>, a great deal"
    assert reviews[1].overrides is not None
    assert reviews[1].overrides.explanation == "lists of measures"
    assert reviews[2].reason == "seen twice: 注 ملاحظة"
    expect(card.locator("li[data-review]")).to_have_count(3)
    page.reload()
    page.locator(f"article[data-card='{feature}']").wait_for()
    expect(card).to_contain_text("lists of measures")
    expect(card.locator("li[data-review]").first).to_contain_text("seen twice: 注 ملاحظة")
    lines = (bank_copy / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert all(json.loads(line)["feature"] == feature for line in lines)


def test_undo_writes_a_further_review_and_removes_nothing(reviewing: Page, bank_copy: Path) -> None:
    page = reviewing
    stay(page)
    feature = current(page)
    status = page.locator(f"[role=option][data-feature='{feature}']")
    page.keyboard.press("a")
    expect(status).to_have_attribute("data-status", "accepted")
    page.keyboard.press("r")
    page.locator("form[data-form=reject]").get_by_role("textbox", name="In your words").fill("too broad")
    page.keyboard.press("Enter")
    expect(status).to_have_attribute("data-status", "rejected")
    logged(bank_copy, 2)  # what was not sent yet would be taken out of the queue
    expect(status).not_to_have_attribute("data-pending", "")
    page.locator("h2").first.click()
    page.keyboard.press("u")
    expect(status).to_have_attribute("data-status", "accepted")
    assert [review.verdict for review in logged(bank_copy, 3)] == ["accept", "reject", "accept"]


def test_thirty_features_are_accepted_by_keyboard_alone_and_all_are_logged_in_order(
    reviewing: Page, bank_copy: Path
) -> None:
    page = reviewing
    wanted = []
    for _ in range(30):
        wanted.append(current(page))
        expect(page.locator("article[data-card]")).to_have_attribute("data-card", wanted[-1])
        page.keyboard.press("a")
        expect(page.locator("[role=option][aria-selected=true]")).not_to_have_attribute("data-feature", wanted[-1])
    reviews = logged(bank_copy, 30)
    assert [review.feature for review in reviews] == wanted
    assert len(set(wanted)) == 30
    assert {review.verdict for review in reviews} == {"accept"}
    expect(page.locator("[data-progress]")).to_have_attribute("data-progress", "30")


def test_keys_do_nothing_while_one_types(reviewing: Page, bank_copy: Path) -> None:
    page = reviewing
    first = current(page)
    search = page.get_by_role("searchbox", name="Search")
    search.click()
    page.keyboard.type("arena", delay=15)
    expect(search).to_have_value("arena")
    expect(page.locator("form[data-form]")).to_have_count(0)
    search.fill("")
    expect(page.locator("[role=option][aria-selected=true]")).to_have_attribute("data-feature", first)
    page.locator("h2").first.click()
    page.keyboard.press("n")
    page.locator("form[data-form=note]").get_by_role("textbox", name="Note").press_sequentially("a rare junk name")
    page.keyboard.press("Escape")
    page.keyboard.press("Control+a")
    page.wait_for_timeout(300)
    assert load_reviews(bank_copy).reviews == ()


def test_a_reviewer_is_asked_for_a_name_once(
    url: str, visit: Any, sign_in: Callable[[str], None], bank_copy: Path
) -> None:
    sign_in("admin")
    page = visit(url, "explorer", sort="id")
    page.locator("article[data-card]").wait_for()
    page.keyboard.press("a")
    page.locator("form[data-form=name]").get_by_role("textbox", name="Your name").fill("B. Reader")
    page.keyboard.press("Enter")
    assert logged(bank_copy, 1)[0].reviewer == "B. Reader"
    expect(page.locator("article[data-card]")).to_have_attribute("data-card", current(page))
    page.keyboard.press("a")
    assert [review.reviewer for review in logged(bank_copy, 2)] == ["B. Reader", "B. Reader"]
    expect(page.locator("[data-reviewer]")).to_contain_text("B. Reader")


def test_a_review_that_fails_is_told_and_can_be_sent_again(reviewing: Page, bank_copy: Path, tab: Any) -> None:
    tab.expected = ["net::", "ERR_"]
    page = reviewing
    first = current(page)
    page.route("**/admin/reviews", lambda route: route.abort())
    page.keyboard.press("a")
    failed = page.locator("[data-state=failed]")
    expect(failed).to_be_visible()
    page.unroute("**/admin/reviews")
    failed.get_by_role("button", name="Try again").click()
    expect(failed).to_have_count(0)
    assert [review.feature for review in logged(bank_copy, 1)] == [first]


@pytest.mark.parametrize("role", ["client", "reader"])
def test_without_an_admin_key_there_is_nothing_to_review_with(
    url: str, visit: Any, sign_in: Callable[[str], None], bank_copy: Path, role: str
) -> None:
    sign_in(role)
    page = visit(url, "explorer")
    page.locator("article[data-card]").wait_for()
    expect(page.locator("[data-state=no-review]")).to_be_visible()
    expect(page.get_by_role("button", name="Accept", exact=True)).to_have_count(0)
    page.keyboard.press("a")
    page.wait_for_timeout(300)
    assert load_reviews(bank_copy).reviews == ()

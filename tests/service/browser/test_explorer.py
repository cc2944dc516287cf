"""The explorer: what is searched for is found as one types, and a card shows all that is known of a feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from feature_bank.bank import Bank, shipped_bank_path

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shipped() -> Bank:
    return Bank.load(shipped_bank_path())


@pytest.fixture
def url(serve: Callable[..., str]) -> str:
    return serve()


def count(page: Page) -> Locator:
    return page.locator("[data-count]").first


def rows(page: Page) -> list[str]:
    found: list[str] = page.locator("[role=option][data-feature]").evaluate_all(
        "(rows) => rows.map((row) => row.dataset.feature)"
    )
    return found


def total(url: str, **query: Any) -> int:
    return int(httpx.get(f"{url}/v1/features", params={**query, "limit": 1}).json()["total"])


def test_all_features_are_listed_and_more_come_as_one_scrolls(url: str, visit: Any, shipped: Bank) -> None:
    page = visit(url, "explorer")
    expect(count(page)).to_have_attribute("data-count", str(len(shipped.features)))
    first = len(rows(page))
    assert 0 < first < len(shipped.features)
    page.locator("[role=option]").last.scroll_into_view_if_needed()
    expect(page.locator("[role=option]").nth(first)).to_be_attached()


def test_what_is_typed_is_searched_for_without_a_further_key(url: str, visit: Any) -> None:
    page = visit(url, "explorer")
    page.locator("[role=option]").first.wait_for()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox", name="Search")).to_be_focused()
    page.keyboard.type("election", delay=20)
    expect(count(page)).to_have_attribute("data-count", str(total(url, q="election")))
    answer = httpx.get(f"{url}/v1/features", params={"q": "election", "limit": 5}).json()
    assert rows(page)[:5] == [feature["id"] for feature in answer["data"]]
    assert "q=election" in page.evaluate("location.hash")
    page.get_by_role("searchbox", name="Search").fill("qqqqxxxx")
    expect(page.locator("[data-state=empty]")).to_be_visible()
    page.get_by_role("button", name="Clear filters").first.click()
    expect(count(page)).to_have_attribute("data-count", str(total(url)))


def test_filters_show_what_they_name_and_the_address_keeps_them(url: str, visit: Any) -> None:
    page = visit(url, "explorer")
    page.get_by_role("combobox", name="Domain").select_option("violence")
    expect(count(page)).to_have_attribute("data-count", str(total(url, domain="violence")))
    layer = httpx.get(f"{url}/v1/about").json()["bank"]["layers"][-1]
    page.get_by_role("combobox", name="Layer").select_option(str(layer))
    expect(count(page)).to_have_attribute("data-count", str(total(url, domain="violence", layer=layer)))
    page.get_by_role("combobox", name="Admitted").select_option("true")
    wanted = total(url, domain="violence", layer=layer, admitted="true")
    expect(count(page)).to_have_attribute("data-count", str(wanted))
    page.get_by_role("combobox", name="Sort by").select_option("density")
    query = {"domain": "violence", "layer": layer, "admitted": "true", "sort": "density", "limit": 3}
    sorted_ids = [feature["id"] for feature in httpx.get(f"{url}/v1/features", params=query).json()["data"]]
    expect(page.locator("[role=option]").first).to_have_attribute("data-feature", sorted_ids[0])
    assert rows(page)[:3] == sorted_ids[:3]
    page.reload()
    expect(count(page)).to_have_attribute("data-count", str(wanted))
    expect(page.get_by_role("combobox", name="Domain")).to_have_value("violence")


def test_a_concept_and_a_least_auroc_narrow_the_list(url: str, visit: Any) -> None:
    page = visit(url, "explorer", min_auroc="0.9")
    expect(count(page)).to_have_attribute("data-count", str(total(url, min_auroc=0.9)))
    concept = httpx.get(f"{url}/v1/about").json()["bank"]["concepts"][0]
    page = visit(url, "explorer", concept=concept)
    expect(count(page)).to_have_attribute("data-count", str(total(url, concept=concept)))


def test_a_card_has_every_part_that_the_feature_has(url: str, visit: Any, shipped: Bank) -> None:
    full = max(shipped.features, key=lambda f: (bool(f.evidence), bool(f.duplicates), len(f.model_fields_set)))
    page = visit(url, "explorer", feature=full.id)
    card = page.locator(f"article[data-card='{full.id}']")
    expect(card.get_by_role("heading", level=2)).to_contain_text(full.id)
    expect(card).to_contain_text(full.explanation)
    blocks = set(card.locator("section[data-block]").evaluate_all("(all) => all.map((one) => one.dataset.block)"))
    assert {"evidence", "activation", "detection", "fidelity", "concepts", "reviews"} <= blocks
    assert card.locator("figure.excerpt").count() > 0
    assert card.locator("figure.excerpt mark").count() > 0
    for section in card.locator("section[data-block]").all():
        assert section.get_by_role("heading", level=3).count() >= 1


def test_a_near_duplicate_is_one_click_away(url: str, visit: Any, shipped: Bank) -> None:
    twin = next(feature for feature in shipped.features if feature.duplicates)
    page = visit(url, "explorer", feature=twin.id)
    link = page.locator("section[data-block=duplicates]").get_by_role("link").first
    other = link.inner_text().strip()
    link.click()
    expect(page.locator(f"article[data-card='{other}']")).to_be_visible()
    assert other.replace("/", "%2F") in page.evaluate("location.hash")


def test_the_list_is_walked_by_keyboard(url: str, visit: Any) -> None:
    page = visit(url, "explorer")
    options = page.locator("[role=option]")
    options.nth(5).wait_for()
    expect(options.nth(0)).to_have_attribute("aria-selected", "true")
    for key, index in (("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        expect(options.nth(index)).to_have_attribute("aria-selected", "true")
        feature = options.nth(index).get_attribute("data-feature")
        expect(page.locator(f"article[data-card='{feature}']")).to_be_visible()
    page.get_by_role("listbox", name="Features").focus()
    page.keyboard.press("End")
    expect(page.locator("[role=option][aria-selected=true]")).to_have_attribute("data-feature", rows(page)[-1])


def test_an_unknown_feature_is_told(url: str, visit: Any, tab: Any) -> None:
    tab.expected = ["404"]
    page = visit(url, "explorer", feature="L99/1")
    expect(page.locator("[data-state=unknown]")).to_contain_text("L99/1")

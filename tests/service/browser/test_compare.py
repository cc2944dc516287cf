"""Two policies over the same texts, on the embedded model: what would change is seen before it is put to use."""

from __future__ import annotations

import csv
import json
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

TEXTS = [
    "A kettle of water boils faster with its lid on.",
    "The bombing of the embassy was claimed by a militant group, and the attack killed several people.",
    "Who won the general election, and which parties formed the government?",
]
LATE = """name: late
on_error: block
rules:
  - {domain: terror, threshold: {probability: 0.9999999}, action: flag}
"""


@pytest.fixture
def page(real: str, visit: Any) -> Page:
    page: Page = visit(real, "compare")
    page.get_by_role("textbox", name="Texts", exact=True).fill("\n".join(TEXTS))
    return page


def side(page: Page, name: str) -> Any:
    return page.locator(f"[data-side={name}]")


def run(page: Page) -> Any:
    page.locator("button[data-act=compare]").click()
    rows = page.locator("tr.text-row")
    expect(rows).to_have_count(len(TEXTS), timeout=60_000)
    return rows


def test_what_changes_between_two_policies_is_marked_and_counted(page: Page, real: str) -> None:
    side(page, "left").get_by_role("combobox", name="Policy").select_option("monitor")
    side(page, "right").get_by_role("combobox", name="Policy").select_option("balanced")
    expect(page.locator(".count")).to_contain_text("3 texts")
    before = httpx.get(f"{real}/v1/about").json()["policy"]
    rows = run(page)
    expect(page.locator(".headline")).to_contain_text("1 of 3 texts change")
    expect(page.locator(".headline")).to_contain_text("1 newly blocked")
    first = rows.first
    expect(first).to_have_attribute("data-index", "1")
    expect(first).to_have_attribute("data-changed", "true")
    assert (first.get_attribute("data-left"), first.get_attribute("data-right")) == ("flag", "block")
    page.get_by_role("button", name="Only what changes").click()
    expect(page.locator("tr.text-row:visible")).to_have_count(1)
    first.locator("button.opener").click()
    expect(page.locator(".side-detail")).to_have_count(2)
    assert httpx.get(f"{real}/v1/about").json()["policy"] == before


def test_a_pasted_policy_is_compared_and_a_wrong_one_is_told_where_it_stands(page: Page, tab: Any) -> None:
    tab.expected = ["400", "409", "422"]
    right = side(page, "right")
    right.get_by_role("combobox", name="Policy").select_option(label="Paste YAML…")
    text = right.get_by_role("textbox", name="Policy as YAML")
    text.fill("name: late\nrules:\n  - {domain: weather, action: flag}\n")
    page.locator("button[data-act=compare]").click()
    alert = right.get_by_role("alert")
    expect(alert).to_contain_text("rules.0.domain")
    expect(page.locator("tr.text-row")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Texts", exact=True)).to_have_value("\n".join(TEXTS))
    text.fill(LATE)
    run(page)
    expect(alert).to_be_hidden()
    expect(page.locator(".headline")).to_contain_text("2 of 3 texts change")
    assert "late" not in page.evaluate("location.hash")
    assert "bombing" not in page.evaluate("location.hash")


def test_the_result_is_saved_as_json_and_as_csv(page: Page) -> None:
    side(page, "right").get_by_role("combobox", name="Policy").select_option("monitor")
    page.get_by_role("textbox", name="Texts", exact=True).fill("\n".join(['=1+1,"quoted"', *TEXTS[1:]]))
    run(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    assert TEXTS[1] in json.dumps(json.loads(download.value.path().read_text(encoding="utf-8")))
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    rows = list(csv.reader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    assert any(TEXTS[1] in cell for row in rows for cell in row)
    assert [cell for row in rows for cell in row if cell.startswith("=")] == []  # a spreadsheet would work it out


def test_it_is_for_admins_alone(serve: Any, keyed: dict[str, Any], visit: Any, sign_in: Any, tab: Any) -> None:
    tab.expected = ["403"]
    sign_in("client")
    page = visit(serve(**keyed), "compare")
    expect(page.get_by_text("An admin key is needed")).to_be_visible()

"""The playground around the embedded model: what it says is seen token by token, with what the guard saw of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser import Tab
from tests.service.browser.driving import ended, flow_of, posted, read, send, settings, tokens

pytestmark = pytest.mark.browser

ELECTION = "The parliament voted on the election law, and the president signed it after a debate between the parties."
PARTIES = "Who won the general election, and which parties formed the government?"
BEES = "How do bees make honey?"


def test_prompt_and_answer_are_shown_as_tinted_tokens(real: str, visit: Any) -> None:
    page = visit(real)
    send(page, PARTIES, max_tokens=12)
    turn = ended(page)
    flow = flow_of(turn)
    assert PARTIES in "".join(tokens(flow, "prompt"))
    answer = tokens(flow, "response")
    assert 1 <= len(answer) <= 13
    assert "".join(answer).strip()
    tinted = flow.locator(".tok.l1, .tok.l2, .tok.l3, .tok.l4")
    assert tinted.count() > 0
    assert all("d-" in name for name in tinted.evaluate_all("(cells) => cells.map((cell) => cell.className)"))
    end = turn.locator(".pg-end[data-run=plain]")
    expect(end).to_have_attribute("data-action", "flag")
    assert end.get_attribute("data-finish") in ("length", "stop")


def test_a_token_is_chosen_by_click_and_by_arrows_and_the_inspector_shows_its_features(real: str, visit: Any) -> None:
    page = visit(real)
    read(page, ELECTION)
    cells = flow_of(ended(page)).locator(".tok")
    panel = page.locator("#pg-token")
    cells.nth(4).click()
    expect(cells.nth(4)).to_have_attribute("aria-current", "true")
    assert panel.locator("tr[data-feature]").count() > 0
    expect(panel.get_by_role("meter")).to_have_count(4)
    for key, index in (("ArrowRight", 5), ("ArrowRight", 6), ("ArrowLeft", 5)):
        before = panel.inner_text()
        page.keyboard.press(key)
        expect(cells.nth(index)).to_have_attribute("aria-current", "true")
        expect(cells.nth(index)).to_be_focused()
        expect(panel).not_to_have_text(before)
    expect(page.locator(".tok[aria-current=true]")).to_have_count(1)
    expect(page.locator(".tok[tabindex='0']")).to_have_count(1)
    assert f"token {cells.nth(5).get_attribute('data-index')} of the prompt" in (
        cells.nth(5).get_attribute("aria-label") or ""
    )


def test_the_inspector_shows_what_the_server_said_of_the_token(real: str, visit: Any) -> None:
    answer = httpx.post(f"{real}/v1/playground", json={"input": ELECTION, "role": "prompt"}, timeout=60).text
    events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: ")]
    said = [token for event in events if event["type"] == "tokens" for token in event["tokens"]]
    page = visit(real)
    read(page, ELECTION)
    flow = flow_of(ended(page))
    assert tokens(flow) == [token["t"] for token in said]
    chosen = said[10]
    flow.locator(".tok").nth(10).click()
    rows = page.locator("#pg-token tr[data-feature]")
    expect(rows.first).to_be_visible()
    shown = rows.evaluate_all("(rows) => rows.map((row) => row.dataset.feature)")
    assert set(shown) <= {feature[0] for feature in chosen["f"]}
    assert chosen["f"][0][0] in shown
    page.get_by_role("button", name="Show all").click()
    expect(rows).to_have_count(len(chosen["f"]))


def test_a_pinned_feature_is_traced_over_the_whole_text(real: str, visit: Any) -> None:
    page = visit(real)
    read(page, ELECTION)
    cells = flow_of(ended(page)).locator(".tok")
    cells.nth(6).click()
    row = page.locator("#pg-token tr[data-feature]").first
    feature = row.get_attribute("data-feature")
    row.get_by_role("button", name="Pin").click()
    trace = page.locator(f".pg-trace[data-series='feature:{feature}']")
    expect(trace).to_be_visible()
    slider = trace.get_by_role("slider")
    assert int(slider.get_attribute("aria-valuemax") or 0) >= cells.count() - 1
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(cells.nth(7)).to_have_attribute("aria-current", "true")
    trace.get_by_role("button", name="Unpin").click()
    expect(trace).to_have_count(0)


def test_a_verdict_stands_in_the_text_at_the_token_that_decided_it(real: str, visit: Any) -> None:
    answer = httpx.post(f"{real}/v1/playground", json={"input": ELECTION, "role": "prompt"}, timeout=60).text
    events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: ")]
    (verdict,) = [event["verdict"] for event in events if event["type"] == "verdict"]
    page = visit(real)
    read(page, ELECTION)
    flow = flow_of(ended(page))
    mark = flow.locator(".verdict")
    expect(mark).to_have_count(1)
    expect(mark).to_have_attribute("data-action", "flag")
    expect(mark).to_have_attribute("data-domain", "politics")
    before = mark.evaluate(
        """(mark) => [...mark.closest(".pg-flow").querySelectorAll(".tok")].filter((cell) =>
            cell.compareDocumentPosition(mark) & Node.DOCUMENT_POSITION_FOLLOWING).at(-1).dataset.index"""
    )
    assert int(before) == verdict["token_index"]
    opener = mark.get_by_role("button").first
    opener.click()
    expect(opener).to_have_attribute("aria-expanded", "true")
    expect(page.locator(".verdict-card")).to_contain_text(verdict["features"][0]["id"])


@pytest.mark.parametrize(
    ("text", "direction"),
    [
        ("全国人民代表大会于周一开幕，代表们讨论了新的法律。", "ltr"),
        ("زرع المزارعون أشجار الزيتون في الربيع، ثم جمعوا الثمار في الخريف.", "rtl"),
    ],
    ids=["chinese", "arabic"],
)
def test_tokens_of_any_script_are_together_the_text_in_its_direction(
    real: str, visit: Any, text: str, direction: str
) -> None:
    page = visit(real)
    read(page, text)
    flow = flow_of(ended(page))
    assert "".join(tokens(flow)) == text
    assert flow.locator(".tok").count() > len(text) // 4
    assert flow.locator(".tok").nth(3).evaluate("(cell) => getComputedStyle(cell).direction") == direction


def test_a_link_brings_all_back_in_a_new_page_and_runs_nothing(real: str, visit: Any, tab: Tab, new_tab: Any) -> None:
    page = visit(real)
    settings(page).get_by_role("textbox", name="System").fill("You speak of <bees> alone.")
    send(page, BEES, max_tokens=5, seed=11)
    ended(page)
    address = page.evaluate("location.href")
    other = new_tab()
    other.goto(address)
    expect(other.page.get_by_role("textbox", name="Message", exact=True)).to_have_value(BEES)
    restored = settings(other.page)
    for name, value in (("Max tokens", "5"), ("Seed", "11")):
        expect(restored.get_by_role("spinbutton", name=name)).to_have_value(value)
    expect(restored.get_by_role("textbox", name="System")).to_have_value("You speak of <bees> alone.")
    assert len(posted(tab)) == 1
    assert posted(other) == []


def test_the_export_is_json_with_every_event(real: str, visit: Any) -> None:
    page = visit(real)
    read(page, ELECTION)
    flow = flow_of(ended(page))
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert download.value.suggested_filename.endswith(".json")
    text = json.dumps(exported, ensure_ascii=False)
    assert ELECTION in text
    for kind in ("start", "tokens", "verdict", "end"):
        assert f'"type": "{kind}"' in text
    assert text.count('"i": ') == len(tokens(flow))


def test_a_follow_up_goes_on_with_what_was_said(real: str, visit: Any) -> None:
    page = visit(real)
    send(page, BEES, max_tokens=6)
    first = "".join(tokens(flow_of(ended(page)), "response"))
    send(page, "And wax?", max_tokens=6)
    expect(page.locator("section.pg-turn")).to_have_count(2)
    prompt = "".join(tokens(flow_of(ended(page)), "prompt"))
    assert BEES in prompt
    assert first.strip()[:10] in prompt
    page.get_by_role("button", name="New", exact=True).click()
    expect(page.locator("section.pg-turn")).to_have_count(0)

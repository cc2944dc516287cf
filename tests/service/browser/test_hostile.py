"""What a person, a model, a bank or a policy says is text on the page and never a part of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from playwright.sync_api import Page, expect

from feature_bank.bank import Bank
from feature_bank.taxonomy import load_taxonomy
from guard.policy import Policy
from tests.browser import Tab
from tests.feature_bank.rich_bank import HOSTILE, write_rich_bank
from tests.service.browser.conftest import KEYS
from tests.service.browser.driving import ended, flow_of, read, remember, send, tokens

pytestmark = pytest.mark.browser

PAYLOADS = (
    "<img/src=x/onerror=window.hacked=1>",
    '"><script>window.hacked=1</script>',
    "'-window.hacked=1-'",
    "javascript:window.hacked=1",
    "</textarea></title></style><svg/onload=window.hacked=1>",
    "{{7*7}}${7*7}",
    "\u202egnihsup\u202c\u2066x\u2069",
)
SPOKEN = " ".join(PAYLOADS)


def clean(page: Page) -> None:
    """Nothing ran, and no element was made of what was said."""
    assert page.evaluate("window.hacked === undefined && document.title.endsWith('sailguard')")
    assert (
        page.locator("main script, main iframe, main object, main style, main img, svg[onload], [onerror]").count() == 0
    )
    assert page.locator("[href^='javascript' i], [src^='javascript' i], [style*='url']").count() == 0
    handlers = (
        "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on'))"
    )
    assert page.evaluate(handlers) == []
    assert "49" not in page.locator("#toasts").inner_text()


@pytest.fixture(scope="module")
def hostile_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of which every text field of some feature is one of HOSTILE."""
    folder = tmp_path_factory.mktemp("hostile") / "bank"
    write_rich_bank(folder, load_taxonomy(), features=3 * len(HOSTILE))
    return folder


@pytest.fixture
def hostile_url(
    serve: Callable[..., str], engine: Any, hostile_bank: Path, keyed: dict[str, Any], tmp_path: Path
) -> str:
    engine.bank = Bank.load(hostile_bank)
    engine.bank_version = HOSTILE[0]
    engine.model_id = HOSTILE[7]
    return serve(engine, bank=hostile_bank, audit=tmp_path / "audit.sqlite", audit_text=True, **keyed)


@pytest.fixture
def admin_page(tab: Tab, sign_in: Callable[[str], None]) -> Iterator[Page]:
    """A tab of an admin whose name means harm, too."""
    sign_in("admin")
    remember(tab.page, "localStorage", "sailguard-reviewer", PAYLOADS[0])
    yield tab.page
    clean(tab.page)


def test_a_prompt_and_an_answer_are_shown_letter_by_letter(hostile_url: str, visit: Any, admin_page: Page) -> None:
    page = visit(hostile_url)
    send(page, SPOKEN, max_tokens=40)
    flow = flow_of(ended(page))
    assert "".join(tokens(flow, "response")).split() == SPOKEN.split()
    assert "".join(tokens(flow, "prompt")).split()[-len(PAYLOADS) :] == SPOKEN.split()[-len(PAYLOADS) :]
    for index in range(1, 6):
        flow.locator(".tok").nth(index).click()
        expect(page.locator("#pg-token tr[data-feature]").first).to_be_visible()
    page.locator("#pg-token tr[data-feature]").first.get_by_role("button", name="Pin").click()
    clean(page)
    read(page, SPOKEN + " violence")
    turn = ended(page)
    assert "".join(tokens(flow_of(turn))) == SPOKEN + " violence"
    turn.locator(".verdict").first.get_by_role("button").first.click()
    clean(page)


@pytest.mark.parametrize("first", range(0, 3 * len(HOSTILE), 17))
def test_a_card_shows_what_the_bank_says_as_it_is(
    hostile_url: str, hostile_bank: Path, visit: Any, admin_page: Page, first: int
) -> None:
    bank = Bank.load(hostile_bank)
    page = visit(hostile_url, "explorer", sort="id", feature=bank.features[first].id)
    for feature in bank.features[first : first + 17 : 4]:
        page.locator(f"[role=option][data-feature='{feature.id}']").click()
        card = page.locator(f"article[data-card='{feature.id}']")
        shown = " ".join((card.text_content() or "").split())
        assert " ".join(feature.explanation.split()) in shown
        clean(page)


def test_reviews_and_their_reviewers_are_text(
    serve: Callable[..., str], keyed: dict[str, Any], bank_copy: Path, visit: Any, admin_page: Page
) -> None:
    url = serve(bank=bank_copy, **keyed)
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}
    feature = httpx.get(f"{url}/v1/features", headers=headers, params={"limit": 1}).json()["data"][0]["id"]
    for payload in PAYLOADS[:-1]:  # the server takes no characters that turn the direction
        body = {"feature": feature, "verdict": "note", "reviewer": payload, "reason": payload}
        assert httpx.post(f"{url}/admin/reviews", headers=headers, json=body).status_code == 200
    body = {"feature": feature, "verdict": "relabel", "reviewer": "x", "overrides": {"explanation": PAYLOADS[0]}}
    assert httpx.post(f"{url}/admin/reviews", headers=headers, json=body).status_code == 200
    page = visit(url, "explorer", feature=feature)
    card = page.locator(f"article[data-card='{feature}']")
    expect(card.locator("li[data-review]")).to_have_count(len(PAYLOADS))
    text = card.text_content() or ""
    assert [payload for payload in PAYLOADS[:-1] if payload not in text] == []
    page.locator("h2").first.click()
    page.keyboard.press("n")
    page.locator("form[data-form=note]").get_by_role("textbox", name="Note").fill(PAYLOADS[1])
    page.keyboard.press("Enter")
    expect(card.locator("li[data-review]")).to_have_count(len(PAYLOADS) + 1)


def test_events_and_a_policy_are_text(
    serve: Callable[..., str], engine: Any, keyed: dict[str, Any], tmp_path: Path, visit: Any, admin_page: Page
) -> None:
    rule = {"domain": "violence", "threshold": {"probability": 0.9}, "action": "block"}
    engine.policy = Policy.model_validate({"name": PAYLOADS[1][:60], "rules": [rule]})
    engine.policy_version = PAYLOADS[0]
    url = serve(engine, audit=tmp_path / "audit.sqlite", audit_text=True, **keyed)
    page = visit(url, "monitor")
    expect(page.locator(".stream-state")).to_have_attribute("data-state", "live")
    headers = {"Authorization": f"Bearer {KEYS['admin']}"}
    httpx.post(f"{url}/v1/moderations", json={"input": f"violence {SPOKEN}"}, headers=headers).raise_for_status()
    event = page.locator("ol.events > li[data-action]").first
    event.locator("button.event").click()
    expect(event.locator(".event-detail")).to_contain_text(PAYLOADS[0])
    clean(page)
    page.get_by_role("button", name="Open its trace").click()
    expect(page.get_by_role("textbox", name="Text", exact=True)).to_have_value(f"violence {SPOKEN}")
    page.locator("#views a[data-view=compare]").click()
    page.get_by_role("textbox", name="Texts", exact=True).fill("\n".join(f"violence {one}" for one in PAYLOADS))
    page.locator("button[data-act=compare]").click()
    expect(page.locator("tr.text-row")).to_have_count(len(PAYLOADS))
    page.locator("button.opener").first.click()
    shown = page.locator(".view-compare").text_content() or ""
    assert [payload for payload in PAYLOADS if payload not in shown] == []


@pytest.mark.parametrize(
    ("view", "names"),
    [
        ("playground", ("s", "pin", "steer")),
        ("explorer", ("q", "feature", "concept", "domain", "sort", "layer")),
        ("monitor", ("q", "domain", "range", "action")),
        ("compare", ("left-bank", "right-policy", "role")),
    ],
)
def test_an_address_brings_in_nothing_but_text(
    serve: Callable[..., str], visit: Any, tab: Tab, view: str, names: tuple[str, ...]
) -> None:
    tab.expected = ["404", "400"]
    page = visit(serve(), view)
    for payload in PAYLOADS:
        page.evaluate("(hash) => { location.hash = hash; }", f"#/{view}?{urlencode(dict.fromkeys(names, payload))}")
        page.wait_for_timeout(150)
        expect(page.locator(f"main .view-{view}")).to_be_visible()
        clean(page)
    page.evaluate("(hash) => { location.hash = hash; }", f"#/{SPOKEN}")
    expect(page.locator("main .view-playground")).to_be_visible()
    clean(page)


def test_a_handed_over_text_is_text(serve: Callable[..., str], visit: Any, tab: Tab) -> None:
    handed = json.dumps({"text": SPOKEN, "role": PAYLOADS[0]})
    remember(tab.page, "sessionStorage", "sailguard-handover", handed)
    page = visit(serve())
    expect(page.get_by_role("textbox", name="Text", exact=True)).to_have_value(SPOKEN)
    clean(page)

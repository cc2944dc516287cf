"""The playground's edges, around the fake engine: stopping, no chat, long waits, broken connections, and way back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import Tab
from tests.service.browser.driving import ended, flow_of, posted, read, send, tokens

pytestmark = pytest.mark.browser


def test_tokens_are_shown_while_more_are_on_their_way_and_stop_ends_it(
    serve: Callable[..., str], visit: Any, engine: Any
) -> None:
    page = visit(serve())
    send(page, "alpha beta WAIT gamma")
    turn = page.locator("section.pg-turn")
    expect(turn).to_have_attribute("data-state", "running")
    expect(flow_of(turn).locator(".tok[data-phase=response]")).to_have_count(2)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(turn).to_have_attribute("data-state", "stopped")
    assert "".join(tokens(flow_of(turn), "response")).split() == ["alpha", "beta"]
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    engine.go.set()
    send(page, "delta epsilon")
    assert "".join(tokens(flow_of(ended(page)), "response")).split() == ["delta", "epsilon"]


def test_an_answer_is_stopped_before_anything_of_it_came(serve: Callable[..., str], visit: Any) -> None:
    page = visit(serve())
    send(page, "WAIT alpha")
    turn = page.locator("section.pg-turn")
    expect(turn).to_have_attribute("data-state", "running")
    page.wait_for_timeout(500)  # charts without a value are drawn, too
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(turn).to_have_attribute("data-state", "stopped")
    expect(turn.locator(".tok")).to_have_count(0)


def test_a_blocked_answer_shows_the_verdict_and_the_refusal_and_not_what_followed(
    serve: Callable[..., str], visit: Any
) -> None:
    page = visit(serve())
    send(page, "alpha beta BLOCK gamma")
    turn = ended(page)
    response = "".join(tokens(flow_of(turn), "response"))
    assert response.split() == ["alpha", "beta"]
    expect(turn.locator(".verdict[data-action=block]").first).to_have_attribute("data-domain", "violence")
    expect(turn.locator(".pg-refusal")).to_contain_text("I cannot help with that.")
    expect(turn.locator(".pg-end")).to_have_attribute("data-finish", "content_filter")
    assert "LEAK" not in page.locator("main").inner_text()


def test_a_server_that_cannot_chat_offers_texts_alone(serve: Callable[..., str], visit: Any, engine: Any) -> None:
    engine.generates = False
    page = visit(serve())
    expect(page.get_by_role("textbox", name="Text", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Chat", exact=True)).to_have_count(0)
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_have_count(0)
    page.get_by_role("textbox", name="Text", exact=True).fill("a sentence about violence")
    page.get_by_role("button", name="Read text", exact=True).click()
    turn = ended(page)
    assert "".join(tokens(flow_of(turn))).split() == ["a", "sentence", "about", "violence"]
    expect(turn.locator(".verdict").first).to_have_attribute("data-domain", "violence")


def test_a_client_may_chat_but_not_steer(
    serve: Callable[..., str], keyed: dict[str, Any], visit: Any, sign_in: Callable[[str], None]
) -> None:
    sign_in("client")
    page = visit(serve(**keyed))
    send(page, "alpha beta")
    assert "".join(tokens(flow_of(ended(page)), "response")).split() == ["alpha", "beta"]
    page.get_by_role("tab", name="Steering").click()
    expect(page.locator("#pg-steering")).to_contain_text("admin")
    expect(page.get_by_role("combobox", name="Add a target")).to_have_count(0)


def test_what_came_stays_when_the_connection_breaks_and_it_can_be_run_again(
    restartable: Callable[..., Any], visit: Any, tab: Tab, engine: Any
) -> None:
    tab.expected = ["net::", "ERR_"]
    server = restartable()
    page = visit(server.start())
    send(page, "alpha beta WAIT gamma")
    turn = page.locator("section.pg-turn").first
    expect(flow_of(turn).locator(".tok[data-phase=response]")).to_have_count(2)
    cut = threading.Thread(target=server.cut)
    cut.start()
    expect(turn).to_have_attribute("data-state", "failed")
    assert "".join(tokens(flow_of(turn), "response")).split() == ["alpha", "beta"]
    trouble = turn.locator(".pg-trouble")
    expect(trouble).to_have_attribute("role", "alert")
    assert len(trouble.inner_text()) > 20
    engine.go.set()
    cut.join()
    trouble.get_by_role("button", name="Run again").click()
    expect(page.locator("section.pg-turn").last.locator(".pg-trouble")).to_be_visible()
    server.start()
    page.locator("section.pg-turn").last.get_by_role("button", name="Run again").click()
    again = flow_of(ended(page))
    assert "".join(tokens(again, "response")).split() == ["alpha", "beta", "WAIT", "gamma"]


def test_an_engine_that_fails_is_told_without_its_secrets(serve: Callable[..., str], visit: Any, tab: Tab) -> None:
    tab.expected = ["500"]
    page = visit(serve())
    send(page, "alpha CRASH gamma")
    turn = ended(page, "failed")
    expect(turn.locator(".pg-trouble")).to_be_visible()
    assert "secret" not in page.locator("main").inner_text()
    assert "".join(tokens(flow_of(turn), "response")).split() == ["alpha"]


def test_nothing_that_was_typed_is_lost_between_views(serve: Callable[..., str], visit: Any, tab: Tab) -> None:
    page = visit(serve())
    page.get_by_role("textbox", name="Message", exact=True).fill("half a question")
    page.locator("#views a[data-view=explorer]").click()
    page.locator("main .view-explorer").wait_for()
    page.locator("#views a[data-view=playground]").click()
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_have_value("half a question")
    assert posted(tab) == []


def test_a_damaged_link_is_told_and_the_page_works(serve: Callable[..., str], visit: Any) -> None:
    page = visit(serve(), s="not-a-state")
    expect(page.locator("#pg-transcript .callout.error")).to_contain_text("This link")
    read(page, "one two three")
    assert "".join(tokens(flow_of(ended(page)))).split() == ["one", "two", "three"]

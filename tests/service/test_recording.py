"""A verdict is durable before the text that follows it is told; if it cannot be, the policy says what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient

from guard.events import StreamEvent
from service.answers import Answer, Choice, Ended, Piece
from service.errors import ApiError
from service.events import EventBus
from service.recording import Recorder

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"
MODERATIONS, TRACES = "/v1/moderations", "/v1/traces"


class Ledger:
    """An audit that notes what it was given among what else happened, and fails if it is told to."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.happened: list[str] = []
        self.entries: list[Any] = []
        self.closed = False

    async def record(self, entries: Sequence[Any], on_error: str) -> bool:
        await asyncio.sleep(0.01)  # a disk takes its time
        if self.fails:
            return on_error != "block"
        self.entries += entries
        self.happened += ["recorded"] * len(entries)
        return True

    async def write(self, entries: Sequence[Any]) -> None:
        await self.record(entries, "block")

    def close(self) -> None:
        self.closed = True


def replace_audit(app: Any, ledger: Ledger) -> None:
    """Put `ledger` in the place of the application's audit."""
    object.__setattr__(app.state.services, "audit", ledger)


@pytest.fixture
def with_ledger(make_app: Callable[..., Any], engine: Any) -> Iterator[Callable[..., tuple[TestClient, Ledger]]]:
    clients = []

    def make(*, fails: bool = False, on_error: str = "block", **settings: Any) -> tuple[TestClient, Ledger]:
        engine.policy = engine.policy.model_copy(update={"on_error": on_error})
        app = make_app(**settings)
        ledger = Ledger(fails=fails)
        replace_audit(app, ledger)
        client = TestClient(app)
        client.__enter__()
        clients.append(client)
        return client, ledger

    yield make
    for client in clients:
        client.__exit__(None, None, None)


class Scripted:
    """An engine whose answers are scripts, each spoken at once."""

    model_id = "scripted"

    def __init__(self, engine: Any, *scripts: Sequence[StreamEvent]) -> None:
        self.policy = engine.policy
        self.scripts = list(scripts)
        self.cancelled = 0
        self.report = engine._report("block", (), 1)

    def generate(self, ids: Any, options: Any, heard: Callable[[Any], None]) -> Any:
        for event in self.scripts.pop(0):
            heard(event)
        return self

    def cancel(self, generation: Any) -> None:
        self.cancelled += 1


def script(engine: Any, *words: str) -> list[StreamEvent]:
    """Words of an answer; `FLAG` and `BLOCK` carry verdicts."""
    events = []
    for word in words:
        verdicts = (engine.verdict("flag" if "FLAG" in word else "block"),) if word.isupper() else ()
        reason: Any = "content_filter" if word == "BLOCK" else None
        events.append(StreamEvent(token_id=1, text=word, verdicts=verdicts, finish_reason=reason))
    if events[-1].finish_reason is None:
        events.append(StreamEvent(token_id=None, text="", finish_reason="stop"))
    return events


def answer_of(served: Scripted, ledger: Ledger, bus: EventBus | None = None) -> Answer:
    recorder = Recorder(
        audit=ledger,
        events=EventBus() if bus is None else bus,
        request_id="req_1",
        key_id="key-1",
        endpoint="chat",
    )
    choices = [Choice(ids=[1], options=None, prompt="said") for _ in served.scripts]  # type: ignore[arg-type]
    return Answer(served, recorder, choices)  # type: ignore[arg-type]  # as much of an engine as an answer needs


async def told(answer: Answer, ledger: Ledger) -> None:
    answer.start()
    try:
        items: AsyncIterator[Piece | Ended] = answer.items()
        async for item in items:
            ledger.happened.append(f"{item.index}:{item.text}" + (" ended" if isinstance(item, Ended) else ""))
    finally:
        answer.close()


def test_verdict_is_recorded_before_its_text_and_before_all_that_follows(engine: Any) -> None:
    ledger = Ledger()
    served = Scripted(engine, script(engine, "a ", "FLAG ", "b ", "BLOCK"))
    asyncio.run(told(answer_of(served, ledger), ledger))
    assert ledger.happened == ["0:a ", "recorded", "0:FLAG ", "0:b ", "recorded", "0:BLOCK ended"]
    assert served.cancelled == 0


def test_entries_say_whose_request_which_choice_and_which_versions(engine: Any) -> None:
    ledger = Ledger()
    served = Scripted(engine, script(engine, "a ", "b "), script(engine, "FLAG ", "c "))
    asyncio.run(told(answer_of(served, ledger), ledger))
    (entry,) = ledger.entries
    assert (entry.request_id, entry.key_id, entry.endpoint, entry.choice) == ("req_1", "key-1", "chat", 1)
    assert (entry.model, entry.bank, entry.policy) == ("scripted", "bank-1", "policy-1")
    assert entry.text == "", "nothing was said before it"


@pytest.mark.parametrize("on_error", ["block", "flag", "allow"])
def test_verdict_that_cannot_be_recorded_ends_the_answer_if_the_policy_says_so(engine: Any, on_error: str) -> None:
    ledger = Ledger(fails=True)
    engine.policy = engine.policy.model_copy(update={"on_error": on_error})
    served = Scripted(engine, script(engine, "a ", "FLAG ", "b "))
    if on_error == "block":
        with pytest.raises(ApiError) as refused:
            asyncio.run(told(answer_of(served, ledger), ledger))
        assert (refused.value.status_code, refused.value.code) == (503, "audit_failed")
        assert ledger.happened == ["0:a "], "neither the text of the verdict nor what follows is told"
        assert served.cancelled == 1
    else:
        asyncio.run(told(answer_of(served, ledger), ledger))
        assert ledger.happened == ["0:a ", "0:FLAG ", "0:b ", "0: ended"]


def test_listeners_hear_of_a_verdict_whether_or_not_it_could_be_recorded(engine: Any) -> None:
    for fails in (False, True):
        ledger, bus = Ledger(fails=fails), EventBus()
        engine.policy = engine.policy.model_copy(update={"on_error": "flag"})

        async def scene(ledger: Ledger = ledger, bus: EventBus = bus) -> list[Any]:
            subscription = bus.subscribe()
            await told(answer_of(Scripted(engine, script(engine, "FLAG ")), ledger, bus), ledger)
            bus.close()
            return [event async for event in subscription]

        heard = asyncio.run(scene())
        assert [(event["action"], event["request_id"]) for event in heard if "action" in event] == [("flag", "req_1")]


def test_verdicts_of_allow_are_nobodys_business(engine: Any) -> None:
    ledger = Ledger(fails=True)
    event = StreamEvent(token_id=1, text="a ", verdicts=(engine.verdict("allow"),))
    end = StreamEvent(token_id=None, text="", finish_reason="stop")
    asyncio.run(told(answer_of(Scripted(engine, [event, end]), ledger), ledger))
    assert ledger.happened == ["0:a ", "0: ended"]


# ---- through the server ------------------------------------------------------------------------------------------


def bodies(word: str) -> list[tuple[str, dict[str, Any]]]:
    chat = {"model": "sailguard", "messages": [{"role": "user", "content": f"one {word}"}]}
    text = {"model": "sailguard", "prompt": f"one {word}"}
    return [
        (CHAT, chat),
        (CHAT, {**chat, "stream": True}),
        (TEXTS, text),
        (TEXTS, {**text, "stream": True}),
        (MODERATIONS, {"input": ["calm", "violence"] if word == "BLOCK" else "calm"}),
        (TRACES, {"input": "violence" if word == "BLOCK" else "calm"}),
    ]


def test_every_endpoint_records_its_verdicts_under_the_requests_own_id(with_ledger: Callable[..., Any]) -> None:
    client, ledger = with_ledger()
    for url, body in bodies("BLOCK"):
        ledger.entries.clear()
        response = client.post(url, json=body)
        assert response.status_code == 200
        assert ledger.entries, url
        assert {entry.request_id for entry in ledger.entries} == {response.headers["X-Request-Id"]}
        assert {entry.endpoint for entry in ledger.entries} == {
            {CHAT: "chat", TEXTS: "completions", MODERATIONS: "moderations", TRACES: "traces"}[url]
        }
        if url == MODERATIONS:
            assert [(entry.choice, entry.text) for entry in ledger.entries] == [(1, "violence")]
    for url, body in bodies("two"):
        ledger.entries.clear()
        assert client.post(url, json=body).status_code == 200
        assert ledger.entries == []


def test_audit_that_fails_blocks_every_endpoint_under_a_policy_that_blocks(
    with_ledger: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    client, _ = with_ledger(fails=True)
    for url, body in bodies("BLOCK"):
        response = client.post(url, json=body)
        if body.get("stream"):
            *before, error = read_events(response.text)
            assert error["error"]["code"] == "audit_failed"
            assert "[DONE]" not in before
            assert "content_filter" not in response.text
        else:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "audit_failed"
            assert "Retry-After" in response.headers
        assert "cannot help" not in response.text
    for url, body in bodies("two"):
        assert client.post(url, json=body).status_code == 200, "what has no verdict needs no audit"


@pytest.mark.parametrize("on_error", ["flag", "allow"])
def test_audit_that_fails_stops_nothing_under_other_policies(with_ledger: Callable[..., Any], on_error: str) -> None:
    client, ledger = with_ledger(fails=True, on_error=on_error)
    for url, body in bodies("BLOCK"):
        response = client.post(url, json=body)
        assert response.status_code == 200
        assert '"block"' in response.text
        assert "audit_failed" not in response.text
    assert ledger.entries == []


def test_audit_is_closed_with_the_server(make_app: Callable[..., Any]) -> None:
    app, ledger = make_app(), Ledger()
    replace_audit(app, ledger)
    with TestClient(app):
        assert not ledger.closed
    assert ledger.closed


def test_the_audit_is_given_the_text_that_a_verdict_is_about(
    with_ledger: Callable[..., tuple[TestClient, Ledger]], chat: Callable[..., dict[str, Any]]
) -> None:
    client, ledger = with_ledger()
    assert client.post("/v1/chat/completions", json=chat("one two BLOCK three")).status_code == 200
    assert [entry.text for entry in ledger.entries] == ["one two "]  # what was said before the deciding token

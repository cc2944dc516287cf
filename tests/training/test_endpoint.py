"""Every question is paid for once, caps hold, and no misbehaviour of a server loses an answer or the key."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.endpoint_server import Behaviour, ScriptedServer, drop, fail, raw, say, without
from training.explain import wire
from training.explain.endpoint import BACKOFF_CEILING, ChatEndpoint
from training.explain.replies import ChatRequest, estimate_tokens
from training.explain.spending import CapReachedError, EndpointError

KEY = "sk-test-0123456789abcdef"
Connect = Callable[..., ChatEndpoint]


def request(text: str, max_answer: int = 20) -> ChatRequest:
    return ChatRequest(messages=[{"role": "user", "content": text}], max_answer=max_answer)


def requests(n: int) -> list[ChatRequest]:
    return [request(f"question {number}") for number in range(n)]


def echo(body: Any) -> str:
    return f"answer to {body['messages'][-1]['content']}"


@pytest.fixture
def connect(tmp_path: Path) -> Any:
    """Endpoints with a cache in common that hardly wait between attempts; closed when the test ends."""
    made: list[ChatEndpoint] = []

    def make(server: ScriptedServer | str, model: str = "model", **options: Any) -> ChatEndpoint:
        url = server if isinstance(server, str) else server.url
        options = {"cache": tmp_path / "cache", "backoff": 0.001, "timeout": 5.0, **options}
        made.append(ChatEndpoint(url, model, **options))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_replies_stand_in_the_order_of_the_requests_and_no_question_is_sent_twice(
    connect: Connect, workers: int
) -> None:
    asked = [*requests(6), request("question 2"), request("question 0")]
    with ScriptedServer(usual=say(echo)) as server:
        replies = connect(server, workers=workers).ask_all(asked)
        again = connect(server, workers=workers).ask_all(asked)
    assert [reply.text for reply in replies] == [f"answer to {r.messages[0]['content']}" for r in asked]
    assert Counter(server.prompts) == {f"question {number}": 1 for number in range(6)}
    assert [(r.text, r.tokens, r.cached) for r in again] == [(r.text, r.tokens, True) for r in replies]


def test_cache_knows_the_question_and_not_the_address(connect: Connect) -> None:
    with ScriptedServer(usual=say("one")) as first, ScriptedServer(usual=say("two")) as second:
        assert connect(first).ask(request("a")).text == "one"
        assert connect(second).ask(request("a")).text == "one"
        assert connect(second, "other model").ask(request("a")).text == "two"
        assert connect(second).ask(request("a", max_answer=21)).text == "two"
    assert len(first.bodies) == 1
    assert len(second.bodies) == 2


def test_requests_are_greedy_and_ask_for_json_with_the_key_in_the_header_alone(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with ScriptedServer() as server:
        endpoint = connect(f"{server.url}/chat/completions/", api_key_env="SOME_KEY")
        endpoint.ask(request("\ud800 broken"))
        connect(server, cache=tmp_path / "other").ask(request("a"))
    body = server.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 20, "model")
    assert body["response_format"] == {"type": "json_object"}
    assert body["messages"] == [{"role": "user", "content": "? broken"}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in server.headers[1]
    assert set(server.paths) == {"/v1/chat/completions"}
    kept = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert kept
    assert not any(KEY in text for text in kept)


TRANSIENT: dict[str, Behaviour] = {
    "500": fail(500),
    "503": fail(503),
    "429": fail(429, Retry_After="0"),
    "half a JSON": raw(b'{"choices": [{"message": {"content": "ha'),
    "nothing": raw(b""),
    "a page": raw(b"<html>busy</html>"),
    "no choice": raw(b'{"choices": []}'),
    "a list": raw(b"[]"),
    "a broken connection": drop,
}


@pytest.mark.parametrize("behaviour", TRANSIENT.values(), ids=TRANSIENT)
def test_passing_trouble_costs_another_call_and_nothing_else(connect: Connect, behaviour: Behaviour) -> None:
    with ScriptedServer(behaviour, behaviour, usual=say(echo)) as server:
        endpoint = connect(server)
        reply = endpoint.ask(request("a"))
    assert reply.text == "answer to a"
    assert endpoint.usage.calls == len(server.bodies) == 3


def test_answers_that_come_too_slowly_or_without_end_are_given_up(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_BODY_BYTES", 500)
    with ScriptedServer(usual=say("in time")) as server:
        server.script = [server.slow(30), server.trickle(0.05), raw(b" " * 5000)]
        endpoint = connect(server, timeout=0.3)
        assert endpoint.ask(request("a")).text == "in time"
    assert endpoint.usage.calls == 4
    assert endpoint.usage.estimated_calls == 3  # they may have been worked on, so they count


@pytest.mark.parametrize("behaviour", [fail(500, "sorry"), raw(b""), drop], ids=["500", "nothing", "drop"])
@pytest.mark.parametrize("workers", [1, 3])
def test_dead_server_is_a_clear_error_and_the_next_run_goes_on(
    connect: Connect, behaviour: Behaviour, workers: int
) -> None:
    good = say(echo)
    with ScriptedServer(good, good, good, usual=behaviour) as server:
        endpoint = connect(server, retries=2, workers=workers)
        with pytest.raises(EndpointError, match=r"3 of 8 requests .* run the same command again"):
            endpoint.ask_all(requests(8))
        answered = server.prompts[:3]
        server.usual = good
        before = len(server.bodies)
        replies = connect(server).ask_all(requests(8))
    assert [reply.text for reply in replies] == [f"answer to question {number}" for number in range(8)]
    assert Counter(server.prompts[before:]) == Counter({f"question {n}" for n in range(8)} - set(answered))


def test_server_that_is_not_there_is_named(connect: Connect) -> None:
    with ScriptedServer() as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*cannot connect.*asked 3 times"):
        connect(url, retries=2).ask(request("a"))


class RecordedWaits(threading.Event):
    """Never waits, but remembers for how long it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return self.is_set()


def test_retry_after_is_honoured_up_to_a_ceiling(connect: Connect) -> None:
    said = ["7", "99999", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", None, "-5"]
    script = [fail(429, **({"Retry_After": value} if value else {})) for value in said]
    with ScriptedServer(*script) as server:
        endpoint = connect(server, retries=6, backoff=0.5)
        endpoint._stopped = waits = RecordedWaits()
        endpoint.ask(request("a"))
    assert waits.waits == [7.0, BACKOFF_CEILING, 0.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("message", [None, "bad request"])
def test_server_without_json_mode_is_found_out_once(connect: Connect, message: str | None) -> None:
    with ScriptedServer(usual=without("response_format", say(echo), message)) as server:
        endpoint = connect(server, workers=3)
        replies = endpoint.ask_all(requests(5))
    assert all(reply.status == "answered" for reply in replies)
    assert len(server.bodies) == 6


def test_newer_name_of_the_answers_limit_is_found_out_once(connect: Connect) -> None:
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with ScriptedServer(usual=without("max_tokens", say("x"), message)) as server:
        connect(server).ask_all(requests(3))
    assert [("max_tokens" in b, b.get("max_completion_tokens")) for b in server.bodies] == [
        (True, None),
        (False, 20),
        (False, 20),
        (False, 20),
    ]


def test_one_refused_request_is_missing_and_the_others_are_not(connect: Connect) -> None:
    def behave(handler: Any, body: Any) -> None:
        too_long = body["messages"][-1]["content"] == "question 1"
        (fail(400, "context_length_exceeded") if too_long else say(echo))(handler, body)

    with ScriptedServer(usual=behave) as server:
        replies = connect(server).ask_all(requests(4))
        only_refused = connect(server).ask_all([request("question 1")])
    assert [reply.status for reply in replies] == ["answered", "refused", "answered", "answered"]
    assert (replies[1].text, replies[1].tokens) == ("", 0)
    assert [reply.status for reply in only_refused] == ["refused"]


def test_server_that_refuses_everything_is_left_alone(connect: Connect) -> None:
    with (
        ScriptedServer(usual=fail(400, "temperature\x1b[2J is not \u202esupported")) as server,
        pytest.raises(EndpointError, match=r"refuses every request: temperature\[2J is not supported"),
    ):
        connect(server).ask_all(requests(50))
    assert len(server.bodies) == 6  # three requests, each with and without JSON mode


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (fail(401, f"Incorrect API key provided: {KEY}"), "401.*check the API key"),
        (fail(404, "no such model"), "404 .no such model.*check the model's name"),
        (fail(302, "over there", Location="http://127.0.0.1:9/v1"), r"302.*redirects are not followed.*127\.0\.0\.1:9"),
        (fail(418, "a teapot"), "418"),
    ],
)
def test_wrong_address_or_key_ends_the_run_at_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, said: str
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with (
        ScriptedServer(usual=behaviour) as server,
        pytest.raises(EndpointError, match=said) as caught,
    ):
        connect(server, api_key_env="SOME_KEY").ask_all(requests(5))
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("cap", [{"max_calls": 4}, {"max_tokens": 100}], ids=["calls", "tokens"])
def test_cap_in_the_middle_holds_and_the_next_runs_pay_for_the_rest_alone(
    connect: Connect, cap: dict[str, int], workers: int
) -> None:
    stops: list[str] = []
    replies = []
    with ScriptedServer(usual=say(echo)) as server:
        while not replies:
            endpoint = connect(server, workers=workers, **cap)
            try:
                replies = endpoint.ask_all(requests(10))
            except CapReachedError as error:
                stops.append(str(error))
            assert 0 < endpoint.usage.calls <= cap.get("max_calls", 99)
            assert endpoint.usage.tokens <= cap.get("max_tokens", 9999)
    assert len(stops) == 2 or "max_tokens" in cap
    assert all("run the same command again" in stop for stop in stops)
    assert Counter(server.prompts) == {f"question {number}": 1 for number in range(10)}
    assert [reply.text for reply in replies] == [f"answer to question {number}" for number in range(10)]


def test_no_call_is_made_under_a_cap_of_none(connect: Connect) -> None:
    with ScriptedServer() as server:
        for cap in ({"max_calls": 0}, {"max_tokens": 0}):
            with pytest.raises(CapReachedError):
                connect(server, **cap).ask(request("a"))
    assert server.bodies == []


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupt_keeps_what_was_answered(connect: Connect, workers: int) -> None:
    def interrupt(handler: Any, body: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        say(echo)(handler, body)

    good = say(echo)
    with ScriptedServer(good, good, good, interrupt, usual=good) as server:
        with pytest.raises(KeyboardInterrupt):
            connect(server, workers=workers).ask_all(requests(40))
        interrupted = Counter(server.prompts)
        replies = connect(server).ask_all(requests(40))
    assert [reply.text for reply in replies] == [f"answer to question {number}" for number in range(40)]
    twice = [prompt for prompt, times in Counter(server.prompts).items() if times > 1]
    assert len(interrupted) < 40
    assert len(twice) <= (1 if workers == 1 else 0)  # alone, the call that was cut off has no answer to keep


def test_tokens_that_a_server_does_not_name_are_estimated(connect: Connect) -> None:
    odd = [{"prompt_tokens": None}, {"prompt_tokens": -1, "completion_tokens": 2}, {"prompt_tokens": True}]
    text = "a b c d e f"
    script = [say(text, report_usage=False), *(say(text, usage=usage) for usage in odd)]
    with ScriptedServer(*script) as server:
        endpoint = connect(server)
        replies = endpoint.ask_all(requests(5))
    assert [reply.estimated for reply in replies] == [True, True, True, True, False]
    assert [reply.completion_tokens for reply in replies] == [6, 6, 6, 6, 5]
    assert endpoint.usage.tokens == sum(reply.tokens for reply in replies)
    assert endpoint.usage.estimated_calls == 4


def test_answer_without_text_is_an_answer(connect: Connect) -> None:
    with ScriptedServer(usual=say(None)) as server:
        reply = connect(server).ask(request("a"))
        assert connect(server).ask(request("a")).cached
    assert (reply.status, reply.text, reply.prompt_tokens) == ("answered", "", 10)


def test_estimate_sends_nothing_and_foretells_the_calls(connect: Connect) -> None:
    with ScriptedServer() as server:
        connect(server).ask_all(requests(3))
        endpoint = connect(server)
        estimate = endpoint.estimate([*requests(8), request("question 7")])
        assert len(server.bodies) == 3
        assert (estimate.calls, estimate.cached, estimate.max_completion_tokens) == (5, 3, 100)
        endpoint.ask_all(requests(8))
    assert endpoint.usage.calls == 5
    assert estimate.prompt_tokens == sum(r.prompt_tokens() for r in requests(8)[3:])


def test_offline_endpoint_reads_the_cache_alone(connect: Connect) -> None:
    with ScriptedServer(usual=say(echo)) as server:
        connect(server).ask_all(requests(2))
    endpoint = connect(server)
    endpoint.offline = True
    assert [reply.status for reply in endpoint.ask_all(requests(3))] == ["answered", "answered", "not_asked"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"text": 1}', b'{"text": "x", "prompt_tokens": "y"}'])
def test_damaged_cache_file_is_asked_for_again(connect: Connect, tmp_path: Path, damage: bytes) -> None:
    with ScriptedServer(usual=say("good")) as server:
        connect(server).ask(request("a"))
        (file,) = (tmp_path / "cache").rglob("*.json")
        file.write_bytes(damage)
        assert connect(server).ask(request("a")).text == "good"
        assert connect(server).ask(request("a")).cached


WRONG_ADDRESSES = (
    *("", "127.0.0.1:8801", "ftp://host/v1", "file:///etc/hosts", "http://", "http://host:port/v1", "http://[::1/v1"),
    *("https://user:secret@host/v1", "http://host/v1?key=secret", "http://host/v1#secret", "http://ho st/v1"),
)


@pytest.mark.parametrize("url", WRONG_ADDRESSES)
def test_address_that_is_no_plain_web_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(EndpointError) as caught:
        ChatEndpoint(url, "model", cache=tmp_path)
    assert "user:secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"), [(KEY, KEY), ("A_KEY", None), ("A_KEY", "  "), ("A_KEY", f"{KEY}\nX: y")]
)
def test_unusable_key_is_refused_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None
) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None and variable == "A_KEY":
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(EndpointError) as caught:
        ChatEndpoint("http://127.0.0.1/v1", "model", cache=tmp_path, api_key_env=variable)
    assert KEY not in str(caught.value)


def test_estimated_tokens_are_near_a_tokenizers(embedded: Any) -> None:
    text = "The ship left the harbour of Genoa in 1492, and its crew of forty sang. " * 5 + "船离开了港口。" * 5
    true = len(embedded.tokenizer(text, add_special_tokens=False).input_ids)
    assert 0.6 * true < estimate_tokens(text) < 1.7 * true

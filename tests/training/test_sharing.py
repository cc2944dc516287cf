"""An endpoint that many ask at once is asked once a question, within its caps, and says for all why it ended."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.training.endpoint_server import PATIENCE, ScriptedServer, fail, say
from training.explain.endpoint import ChatEndpoint
from training.explain.replies import ChatRequest
from training.explain.sharing import SharedEndpoint
from training.explain.spending import MINUTE, CapReachedError, EndpointError, Pace

CALLERS = 6


def requests(first: int, n: int) -> list[ChatRequest]:
    return [
        ChatRequest(messages=[{"role": "user", "content": f"question {number}"}], max_answer=20)
        for number in range(first, first + n)
    ]


def echo(body: Any) -> str:
    return f"answer to {body['messages'][-1]['content']}"


@pytest.fixture
def connect(tmp_path: Path) -> Any:
    made: list[ChatEndpoint] = []

    def make(server: ScriptedServer, **options: Any) -> ChatEndpoint:
        made.append(ChatEndpoint(server.url, "model", cache=tmp_path / "cache", backoff=0.001, **options))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.close()


def test_callers_get_their_replies_in_order_and_what_two_want_is_sent_once(connect: Any) -> None:
    with ScriptedServer(usual=say(echo)) as server, SharedEndpoint(connect(server, workers=4)) as shared:
        asked = [requests(caller, 4) for caller in range(CALLERS)]
        found = [shared.submit(each) for each in asked]
        for each, replies in zip(asked, found, strict=True):
            assert [r.text for r in replies.result()] == [f"answer to {r.messages[0]['content']}" for r in each]
        assert shared.submit([]).result() == []
        assert shared.failure is None
        assert set(Counter(server.prompts).values()) == {1}
        assert len(server.prompts) == CALLERS + 3


def test_a_request_that_is_refused_is_not_sent_again_for_another_caller(connect: Any) -> None:
    def behave(handler: Any, body: Any) -> None:
        (fail(400, "filtered") if "question 1" in echo(body) else say(echo))(handler, body)

    with ScriptedServer(usual=behave) as server, SharedEndpoint(connect(server)) as shared:
        first, second = shared.submit(requests(0, 2)).result(), shared.submit(requests(1, 2)).result()
        assert [r.status for r in (*first, *second)] == ["answered", "refused", "refused", "answered"]
        assert Counter(server.prompts)["question 1"] == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_a_cap_ends_it_for_all_to_the_call(connect: Any, workers: int) -> None:
    with ScriptedServer(usual=say(echo)) as server:
        endpoint = connect(server, workers=workers, max_calls=7)
        with SharedEndpoint(endpoint) as shared:
            found = [shared.submit(requests(4 * caller, 4)) for caller in range(CALLERS)]
            statuses = Counter(reply.status for replies in found for reply in replies.result())
            assert statuses == {"answered": 7, "not_asked": 4 * CALLERS - 7}
            assert isinstance(shared.failure, CapReachedError)
            assert str(endpoint.cache.folder) in str(shared.failure)
        assert len(server.bodies) == 7
        with SharedEndpoint(connect(server, workers=workers)) as shared:
            assert {r.status for r in shared.submit(requests(0, 4 * CALLERS)).result()} == {"answered"}
        assert len(server.bodies) == 4 * CALLERS


def test_a_wrong_key_ends_it_for_all_with_one_call(connect: Any) -> None:
    with (
        ScriptedServer(usual=fail(401, "who are you?")) as server,
        SharedEndpoint(connect(server, workers=4)) as shared,
    ):
        found = [shared.submit(requests(caller, 4)) for caller in range(CALLERS)]
        assert {reply.status for replies in found for reply in replies.result()} == {"not_asked"}
        assert isinstance(shared.failure, EndpointError)
        assert "check the API key" in str(shared.failure)
        assert len(server.bodies) == 1


def interrupt(shared: SharedEndpoint, asked: list[ChatRequest], before: threading.Event) -> None:
    with shared:
        shared.submit(asked)
        assert before.wait(PATIENCE)
        raise KeyboardInterrupt


def test_an_interruption_keeps_what_is_under_way_and_asks_no_more(
    connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, go = threading.Event(), threading.Event()

    def behave(handler: Any, body: Any) -> None:
        arrived.set()
        go.wait(PATIENCE)
        say(echo)(handler, body)

    with ScriptedServer(usual=behave) as server:
        endpoint = connect(server, workers=2)
        stop = endpoint.stop
        monkeypatch.setattr(endpoint, "stop", lambda: (stop(), go.set()))
        with pytest.raises(KeyboardInterrupt):
            interrupt(SharedEndpoint(endpoint), requests(0, 8), arrived)
        assert len(server.bodies) == 1  # in whose answer it is seen what the server accepts
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends = float("inf")

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self.ends


def test_no_minute_has_more_calls_than_it_may() -> None:
    clock = Clock()
    pace = Pace(3, clock=clock)
    begun = []
    for number in range(20):
        assert pace.wait(clock)  # type: ignore[arg-type]
        begun.append(clock.now)
        clock.now += 7.0 * (number % 4)
    assert all(later - earlier >= MINUTE for earlier, later in zip(begun, begun[3:], strict=False))
    clock.ends = clock.now
    assert not all(pace.wait(clock) for _ in range(4))  # type: ignore[arg-type]
    assert Pace(None).wait(threading.Event())


def test_calls_beyond_the_pace_are_given_up_when_all_is_stopped(connect: Any) -> None:
    second = threading.Event()

    def behave(handler: Any, body: Any) -> None:
        say(echo)(handler, body)
        if len(server.bodies) == 2:
            second.set()

    with ScriptedServer(usual=behave) as server:
        endpoint = connect(server, workers=2, per_minute=2)
        with pytest.raises(KeyboardInterrupt):
            interrupt(SharedEndpoint(endpoint), requests(0, 4), second)
        assert len(server.bodies) == endpoint.usage.calls == 2

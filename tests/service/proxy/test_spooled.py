"""What of a proxied answer comes into the spool: all that was judged, once it has ended or was blocked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from feature_bank.spool_acts import Acts
from guard.metrics import Metrics
from service.audit import NoAudit
from service.events import EventBus
from service.proxy_judging import Growing, Proxied
from service.recording import Recorder
from service.spool import Kept, Spooled
from tests.service.proxy.keywords import DELICATE, WORD, FakeReleased, KeywordEngine

SEEN = Acts(np.zeros(2, dtype=np.int64), np.ones((2, 3), dtype=np.float32))


class Spool:
    """A spool that keeps what it is offered in memory."""

    on = True

    def __init__(self) -> None:
        self.kept: list[Kept] = []

    def samples(self, request_id: str) -> bool:
        return False

    def offer(self, kept: Kept) -> None:
        self.kept.append(kept)

    def close(self) -> None:
        pass


class Judge:
    """Judges an answer by words, and tells what it has found and seen."""

    def __init__(self, engine: KeywordEngine) -> None:
        self._engine = engine
        self._verdicts: list[Any] = []

    def push(self, text: str, *, last: bool = False) -> FakeReleased:
        found = tuple(self._engine.verdict(word, "response") for word in (WORD, DELICATE) if word in text)
        self._verdicts += found
        return FakeReleased(text, found, any(verdict.action == "block" for verdict in found))

    def report(self) -> Any:
        return SimpleNamespace(verdicts=tuple(self._verdicts), response_scores={"violence": 0.5})

    def seen(self) -> Acts:
        return SEEN


class Runner:
    async def call(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.fixture
def spool() -> Spool:
    return Spool()


@pytest.fixture
def proxied(spool: Spool) -> Proxied:
    metrics = Metrics()
    engine: Any = KeywordEngine(metrics)
    engine.open_response = lambda *, keep=False: Judge(engine) if keep else pytest.fail("nothing is kept")
    spooled = Spooled.of(spool, "req_1", "chat")
    recorder = Recorder(
        audit=NoAudit(), events=EventBus(), request_id="req_1", key_id=None, endpoint="chat", spool=spooled
    )
    services: Any = SimpleNamespace(runner=Runner(), metrics=metrics)
    return Proxied(services=services, engine=engine, recorder=recorder, record=SimpleNamespace())  # type: ignore[arg-type]


def push(proxied: Proxied, growing: Growing, text: str, *, last: bool = False, choice: int = 0) -> None:
    asyncio.run(proxied.push([(choice, growing, text, last)]))


def test_a_flagged_answer_is_kept_at_its_end(proxied: Proxied, spool: Spool) -> None:
    growing = Growing()
    push(proxied, growing, f"a {DELICATE} ", choice=2)
    assert spool.kept == []
    push(proxied, growing, "is there", last=True, choice=2)
    (kept,) = spool.kept
    assert (kept.choice, kept.phase, kept.streamed, kept.text) == (2, "response", True, f"a {DELICATE} is there")
    assert [verdict.action for verdict in kept.verdicts] == ["flag"]
    assert kept.seen() is SEEN  # type: ignore[operator]


def test_a_blocked_answer_is_kept_at_once(proxied: Proxied, spool: Spool) -> None:
    push(proxied, Growing(), f"a {WORD} ")
    assert [[verdict.action for verdict in kept.verdicts] for kept in spool.kept] == [["block"]]


def test_an_answer_without_a_verdict_is_not_kept(proxied: Proxied, spool: Spool) -> None:
    push(proxied, Growing(), "a hill", last=True)
    assert spool.kept == []

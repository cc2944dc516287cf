"""The playground's events as they stand on the wire: server-sent events, each a JSON object."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from service.answers import Ended
from service.errors import ApiError, internal_error
from service.playground import Told, TracedAnswer

if TYPE_CHECKING:
    from guard.events import Phase, Trace, TraceToken, Verdict
    from service.attending import Deadline
    from service.engine import ServedEngine
    from service.middleware import Record

__all__ = ["Event", "Events", "chat_events", "text_events", "to_the_end"]

CHUNK = 256
"""Most tokens of one event."""
_FEW = 8  # tokens that are written down on the event loop: a thread of its own would cost more
_DIGITS = 6

Event = dict[str, str]


class Events:
    """Makes the events of one request."""

    def __init__(self, engine: ServedEngine, request_id: str) -> None:
        self._engine = engine
        self._id = request_id
        self._domains = list(engine.bank.heads)

    def start(self, mode: str, runs: Sequence[str], seed: int | None = None) -> Event:
        """The first event."""
        engine = self._engine
        return _data(
            type="start",
            id=self._id,
            model=engine.model_id,
            bank=engine.bank_version,
            policy=engine.policy_version,
            seed=seed,
            runs=list(runs),
            domains=self._domains,
            mode=mode,
        )

    async def part(
        self, run: str, phase: Phase, tokens: Sequence[TraceToken], verdicts: Sequence[Verdict]
    ) -> AsyncIterator[Event]:
        """Some tokens of a phase and the verdicts among them, each behind the token that decided, if that is told."""
        first = 0
        for verdict in sorted(verdicts, key=lambda verdict: verdict.token_index):
            stop = first
            while stop < len(tokens) and tokens[stop].index <= verdict.token_index:
                stop += 1
            async for event in self._chunks(run, phase, tokens[first:stop]):
                yield event
            first = stop
            yield _data(type="verdict", run=run, verdict=verdict.to_dict())
        async for event in self._chunks(run, phase, tokens[first:]):
            yield event

    async def _chunks(self, run: str, phase: Phase, tokens: Sequence[TraceToken]) -> AsyncIterator[Event]:
        for first in range(0, len(tokens), CHUNK):
            chunk = tokens[first : first + CHUNK]
            if len(chunk) <= _FEW:
                yield self._written(run, phase, chunk)
            else:
                yield await asyncio.to_thread(self._written, run, phase, chunk)

    def _written(self, run: str, phase: Phase, tokens: Sequence[TraceToken]) -> Event:
        return _data(type="tokens", run=run, phase=phase, tokens=[self._token(token) for token in tokens])

    def _token(self, token: TraceToken) -> dict[str, Any]:
        return {
            "i": token.index,
            "t": token.text,
            "o": token.observed,
            "g": 0 if token.observed and token.segment is None else token.segment,
            "s": [round(token.scores[domain], _DIGITS) for domain in self._domains] if token.scores else [],
            "f": [(hit.id, hit.activation, hit.contribution) for hit in token.features],
        }


async def chat_events(
    events: Events, answer: TracedAnswer, runs: Sequence[str], *, seed: int | None, record: Record, deadline: Deadline
) -> AsyncIterator[Event]:
    """The events of a chat's runs."""
    items = answer.told()
    yield events.start("chat", runs, seed)
    while True:
        async with deadline.kept():
            item = await anext(items, None)
        if item is None:
            break
        run = runs[item.index]
        if isinstance(item, Told):
            on_prompt = [verdict for verdict in item.verdicts if verdict.phase == "prompt"]
            async for event in events.part(run, "prompt", item.prompt, on_prompt):
                yield event
            on_answer = [verdict for verdict in item.verdicts if verdict.phase == "response"]
            async for event in events.part(run, "response", item.tokens, on_answer):
                yield event
        else:
            record.action = answer.action
            yield _end(run, item, prompt_tokens=len(answer.choices[item.index].ids))
    yield _data(type="done")


async def text_events(events: Events, trace: Trace, *, run: str, phase: Phase, most: int) -> AsyncIterator[Event]:
    """The events of a text that has been judged; of its tokens `most` are shown."""
    score, tokens = trace.score, trace.tokens[:most]
    yield events.start("text", [run])
    async for event in events.part(run, phase, tokens, score.verdicts):
        yield event
    yield _data(
        type="end",
        run=run,
        finish_reason="content_filter" if score.action == "block" else "stop",
        action=score.action,
        prompt_scores=dict(score.scores) if phase == "prompt" else {},
        response_scores=dict(score.scores) if phase == "response" else {},
        refusal=None,
        tokens={"prompt": 0, "response": 0, phase: len(tokens)},
        truncated=score.truncated or len(trace.tokens) > most,
    )
    yield _data(type="done")


async def to_the_end(events: AsyncIterator[Event], record: Record) -> AsyncIterator[Event]:
    """All of the events, and one that says so if something fails on the way: the status line is sent already."""
    try:
        async for event in events:
            yield event
    except Exception as error:  # noqa: BLE001 - it is logged and sent
        record.fail(error)
        refusal = error if isinstance(error, ApiError) else internal_error()
        yield _data(type="error", message=refusal.message, code=refusal.code)


def _end(run: str, ended: Ended, *, prompt_tokens: int) -> Event:
    report = ended.report
    return _data(
        type="end",
        run=run,
        finish_reason=ended.finish_reason,
        action=report.action,
        prompt_scores=dict(report.prompt_scores),
        response_scores=dict(report.response_scores),
        refusal=ended.text if ended.finish_reason == "content_filter" else None,
        tokens={"prompt": prompt_tokens, "response": report.tokens_generated},
        truncated=False,
    )


def _data(**event: Any) -> Event:
    return {"data": json.dumps(event, allow_nan=False, separators=(",", ":"))}

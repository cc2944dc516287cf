"""Chats of the playground: several runs of one chat, generated side by side and traced token by token.

A verdict is on record before anything is told that came with it or later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from feature_bank.errors import SailguardError
from service.answers import Answer, Ended
from service.errors import audit_failed, internal_error

if TYPE_CHECKING:
    from guard.events import SequenceReport, StreamEvent, TraceToken, Verdict

__all__ = ["Told", "TracedAnswer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What may be told of run `index` now: first the prompt's tokens, then some of the answer's, and the verdicts."""

    index: int
    prompt: Sequence[TraceToken]
    tokens: Sequence[TraceToken]
    verdicts: Sequence[Verdict]


class _Relay:
    """Hears one run on the model's thread, and passes every event on with the tokens that it shows."""

    def __init__(self, index: int, queue: asyncio.Queue[_Heard]) -> None:
        self._index = index
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._prompt: Sequence[TraceToken] = ()
        self._tokens: list[TraceToken] = []

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        self._prompt = tokens

    def token(self, token: TraceToken) -> None:
        self._tokens.append(token)

    def heard(self, event: StreamEvent | SailguardError) -> None:
        heard = _Heard(self._index, event, self._prompt, self._tokens)
        self._prompt, self._tokens = (), []
        with contextlib.suppress(RuntimeError):  # a loop that is closed has no reader left
            self._loop.call_soon_threadsafe(self._queue.put_nowait, heard)


@dataclass(frozen=True, slots=True)
class _Heard:
    index: int
    event: StreamEvent | SailguardError
    prompt: Sequence[TraceToken]
    tokens: Sequence[TraceToken]


@dataclass(slots=True)
class TracedAnswer(Answer):
    """The runs of one request, under way from `start` to `close`: each choice is one."""

    _relayed: asyncio.Queue[_Heard] = field(default_factory=asyncio.Queue)
    _traced: dict[int, str] = field(default_factory=dict)

    def start(self) -> None:
        """Begin every run. Raises `SailguardError` if the engine takes none."""
        for index, choice in enumerate(self.choices):
            relay = _Relay(index, self._relayed)
            self._open[index] = self.engine.generate(
                choice.ids, choice.options, relay.heard, relay, **self._spooling.keeper(index)
            )

    async def told(self) -> AsyncIterator[Told | Ended]:
        """What there is to tell of the runs, as it comes.

        Raises `SailguardError` if the engine fails, `ApiError` (503) if a verdict cannot be put on record and the
        policy wants it to be, and (500) if the trace of an answer is not that of its text.
        """
        while self._open:
            heard = await self._relayed.get()
            index, event = heard.index, heard.event
            if index not in self._open:
                continue  # the run has ended: whatever an engine says after that is not heard
            if isinstance(event, SailguardError):
                raise event
            if not await self._record(index, event):
                raise audit_failed()
            blocked = event.finish_reason == "content_filter"
            if not blocked:
                self._said[index] = self._said.get(index, "") + event.text
            self._traced[index] = self._traced.get(index, "") + "".join(token.text for token in heard.tokens)
            yield Told(index=index, prompt=heard.prompt, tokens=heard.tokens, verdicts=event.verdicts)
            if event.finish_reason is None:
                continue
            if not blocked and self._traced[index] != self._said[index]:
                raise internal_error()  # tracing failed on the way, which the log says
            generation = self._open.pop(index)
            report: SequenceReport = generation.report  # type: ignore[attr-defined]
            self.reports[index] = report
            self._spooling.ended(index, report, self._said.get(index, ""))
            text = event.text if blocked else ""
            yield Ended(index=index, text=text, finish_reason=event.finish_reason, report=report)

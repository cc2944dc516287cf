"""One guarded answer of several choices: generated side by side, and told as it comes or as a whole.

What the wire calls them is the routes' business: chats and completions differ in little but the names.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from feature_bank.errors import SailguardError
from service.errors import audit_failed
from service.schemas import strongest
from service.spool_answers import AnswerSpool

if TYPE_CHECKING:
    from guard.events import SequenceReport, StreamEvent
    from guard.serving import GenerationOptions
    from service.engine import AnsweringEngine
    from service.recording import Recorder

__all__ = ["Answer", "Choice", "Ended", "Piece"]

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One choice that is to be generated."""

    ids: Sequence[int]
    options: GenerationOptions
    prompt: str
    """Its text, for an audit that keeps texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text of choice `index` that may be shown."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Choice `index` is complete. After a block `text` is what stands in place of the answer, else empty."""

    index: int
    text: str
    finish_reason: FinishReason
    report: SequenceReport


@dataclass(slots=True)
class Answer:
    """The choices of one request, under way from `start` to `close`."""

    engine: AnsweringEngine
    recorder: Recorder
    choices: Sequence[Choice]
    reports: dict[int, SequenceReport] = field(default_factory=dict)
    _heard: asyncio.Queue[tuple[int, StreamEvent | SailguardError]] = field(default_factory=asyncio.Queue)
    _open: dict[int, object] = field(default_factory=dict)
    _said: dict[int, str] = field(default_factory=dict)
    _spooling: AnswerSpool = field(init=False)

    def __post_init__(self) -> None:
        self._spooling = AnswerSpool(self.engine, self.recorder.spool, self.choices)

    @property
    def action(self) -> str:
        """The strongest action taken on any choice."""
        return strongest([report.action for report in self.reports.values()])

    @property
    def generated(self) -> int:
        """Tokens generated, all choices together."""
        return sum(report.tokens_generated for report in self.reports.values())

    def start(self) -> None:
        """Begin every choice. Raises `SailguardError` if the engine takes none."""
        loop = asyncio.get_running_loop()
        for index, choice in enumerate(self.choices):

            def heard(event: StreamEvent | SailguardError, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # a loop that is closed has no reader left
                    loop.call_soon_threadsafe(self._heard.put_nowait, (index, event))

            self._open[index] = self.engine.generate(choice.ids, choice.options, heard, **self._spooling.keeper(index))

    def close(self) -> None:
        """End what is still under way. May be called more than once."""
        while self._open:
            index, generation = self._open.popitem()
            self.engine.cancel(generation)  # type: ignore[arg-type]
            self._spooling.broken_off(index, self._said.get(index, ""))

    async def items(self) -> AsyncIterator[Piece | Ended]:
        """What the choices say, as it comes. A verdict is on record before the text that follows it is told.

        Raises `SailguardError` if the engine fails, `ApiError` (503) if a verdict cannot be put on record and the
        policy wants it to be.
        """
        while self._open:
            index, event = await self._heard.get()
            if index not in self._open:
                continue  # The choice has ended: whatever an engine says after that is not heard.
            if isinstance(event, SailguardError):
                raise event
            if not await self._record(index, event):
                raise audit_failed()
            if event.finish_reason != "content_filter":
                self._said[index] = self._said.get(index, "") + event.text
            if event.finish_reason is None:
                yield Piece(index=index, text=event.text)
                continue
            generation = self._open.pop(index)
            report: SequenceReport = generation.report  # type: ignore[attr-defined]
            self.reports[index] = report
            blocked = event.finish_reason == "content_filter"
            self._spooling.ended(index, report, self._said.get(index, ""))
            if event.text and not blocked:
                yield Piece(index=index, text=event.text)
            yield Ended(
                index=index,
                text=event.text if blocked else "",
                finish_reason=event.finish_reason,
                report=report,
            )

    async def _record(self, index: int, event: StreamEvent) -> bool:
        """Keep an event's verdicts: those on the prompt with it, those on the answer with what was said before."""
        kept = True
        self._spooling.told(index, event.verdicts)
        for phase, text in (("prompt", self.choices[index].prompt), ("response", self._said.get(index, ""))):
            verdicts = [verdict for verdict in event.verdicts if verdict.phase == phase]
            kept = await self.recorder.record(self.engine, verdicts, choice=index, text=text) and kept
        return kept

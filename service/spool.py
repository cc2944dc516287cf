"""What the server spools: a sample of what it judges, and everything that had a verdict, as the guard saw it.

Whoever judged hands over what there is to keep and goes on at once; what cannot be kept is counted, and nothing else.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from feature_bank.layout import clean
from feature_bank.spool import MAX_TOKENS, Acts, SpoolError, SpoolItem, pack
from service.schemas import strongest

if TYPE_CHECKING:
    from typing import Any

    from feature_bank.bank import Bank
    from feature_bank.layout import Role
    from guard.events import Phase, TextScore, Verdict
    from guard.metrics import Metrics
    from guard.policy import Policy
    from service.engine import ServedEngine
    from service.settings import Settings
    from service.spool_writer import SpoolWriter

__all__ = ["Kept", "NoSpool", "Spooled", "Spooling", "open_spool"]

Reading = Callable[[], Acts | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One judged text or answer that is to be kept."""

    engine: ServedEngine
    """By which it was judged."""
    request_id: str
    endpoint: str
    choice: int
    phase: Phase
    streamed: bool
    verdicts: Sequence[Verdict]
    """Those on this phase."""
    scores: Mapping[str, float]
    sampled: bool
    seen: Acts | Reading
    """The activations, or what makes them of what was collected; that is called on the writer's thread."""
    text: str | None
    unix: float = field(default_factory=time.time)

    @property
    def bank(self) -> Bank:
        """The bank of the activations."""
        return self.engine.bank

    @property
    def policy(self) -> Policy:
        """The policy of the verdicts."""
        return self.engine.policy

    @property
    def flagged(self) -> tuple[str, ...]:
        """The domains of its verdicts."""
        found = {verdict.domain for verdict in self.verdicts if verdict.action != "allow"}
        return tuple(domain for domain in self.bank.heads if domain in found)

    def acts(self) -> Acts | None:
        """The activations of at most `MAX_TOKENS` tokens: the first ones, or those up to the first decision."""
        seen = self.seen if isinstance(self.seen, Acts) else self.seen()
        return None if seen is None else _cut(seen, self.verdicts)

    def item(self, acts: Acts, *, text: bool) -> SpoolItem:
        """As it is stored; without `text` the text is left out. Raises DataError for what cannot be stored."""
        unknown = dict.fromkeys(self.bank.heads, 0.0)
        action: Any = strongest([verdict.action for verdict in self.verdicts])
        return SpoolItem(
            unix=self.unix,
            request_id=clean(self.request_id),
            endpoint=self.endpoint,
            choice=self.choice,
            phase=self.phase,
            streamed=self.streamed,
            bank=clean(self.engine.bank_version),
            content_hash=self.bank.content_hash,
            policy=clean(self.engine.policy_version),
            model=clean(self.engine.model_id),
            action=action,
            scores={**unknown, **{name: float(score) for name, score in self.scores.items()}},
            flagged=self.flagged,
            tokens=len(acts.segments),
            acts=pack(acts.segments, acts.acts),
            why="sampled" if self.sampled else "verdict",
            text=clean(self.text) if text and self.text is not None else None,
        )


class Spooling(Protocol):
    """What the routes see: a spool, or none."""

    @property
    def on(self) -> bool:
        """Whether anything is kept."""

    def samples(self, request_id: str) -> bool:
        """Whether what is judged for this request is kept whatever comes of it. Always the same for the same id."""

    def offer(self, kept: Kept) -> None:
        """Have it kept, if there is room. Returns at once and never fails."""

    def close(self) -> None:
        """Write what waits and close."""


class NoSpool:
    """Where no spool is configured."""

    on = False

    def samples(self, request_id: str) -> bool:  # noqa: ARG002 - as Spool's
        """Sample nothing."""
        return False

    def offer(self, kept: Kept) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Close nothing."""


class OpenSpool:
    """A spool in a file, which other processes may be writing too; made by `open_spool`."""

    on = True

    def __init__(self, writer: SpoolWriter, share: float) -> None:
        self._writer = writer
        self._share = share

    def samples(self, request_id: str) -> bool:
        """Whether this request is in the sample, by the hash of its id."""
        number = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big")
        return number < self._share * 2**64

    def offer(self, kept: Kept) -> None:
        """Leave it to the writer."""
        self._writer.submit(kept)

    def close(self) -> None:
        """Write what waits and close the file."""
        self._writer.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """The spool as one request sees it."""

    spool: Spooling
    request_id: str
    endpoint: str
    sampled: bool

    @classmethod
    def of(cls, spool: Spooling, request_id: str, endpoint: str) -> Self:
        """The spool for a request; whether it is in the sample is decided here, before anything is judged."""
        return cls(spool=spool, request_id=request_id, endpoint=endpoint, sampled=spool.samples(request_id))

    @classmethod
    def off(cls) -> Self:
        """Where no spool is configured."""
        return cls(spool=NoSpool(), request_id="", endpoint="", sampled=False)

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self.spool.on

    @property
    def keep(self) -> bool | None:
        """What a scorer is told: whether texts are kept even without a verdict; None where none are."""
        return self.sampled if self.spool.on else None

    def text(self, engine: ServedEngine, score: TextScore, role: Role, *, choice: int, text: str) -> None:
        """Keep a text that was judged whole, if it is to be kept."""
        if score.seen is not None:
            phase: Phase = "response" if role == "response" else "prompt"
            acts = _cut(score.seen, score.verdicts)
            self.part(engine, phase, acts, score.verdicts, score.scores, choice=choice, text=text, streamed=False)

    def part(
        self,
        engine: ServedEngine,
        phase: Phase,
        seen: Acts | Reading,
        verdicts: Sequence[Verdict],
        scores: Mapping[str, float],
        *,
        choice: int,
        text: str | None,
        streamed: bool,
    ) -> None:
        """Keep a prompt or an answer, if it is to be kept: `verdicts` are those on it."""
        found = [verdict for verdict in verdicts if verdict.action != "allow"]
        if not self.spool.on or not (self.sampled or found):
            return
        self.spool.offer(
            Kept(
                engine=engine,
                request_id=self.request_id,
                endpoint=self.endpoint,
                choice=choice,
                phase=phase,
                streamed=streamed,
                verdicts=found,
                scores=scores,
                sampled=self.sampled,
                seen=seen,
                text=text,
            )
        )


def open_spool(settings: Settings, metrics: Metrics, logger: Any) -> Spooling:
    """The spool of the settings. Raises SpoolError for a file that is no spool or cannot be written, and for texts that
    would be kept for ever: new ones, and those that the file holds from before."""
    if settings.spool is None:
        return NoSpool()
    if settings.spool_text and not settings.spool_days:
        raise SpoolError(
            "setting 'spool_text': texts are kept for a limited time only: set SAILGUARD_SPOOL_DAYS to 1 or more"
        )
    from service.spool_writer import SpoolWriter

    writer = SpoolWriter(
        settings.spool,
        text=settings.spool_text,
        days=settings.spool_days,
        most=settings.spool_max_bytes,
        metrics=metrics,
        logger=logger,
    )
    return OpenSpool(writer, settings.spool_share)


def _cut(seen: Acts, verdicts: Sequence[Verdict]) -> Acts:
    """At most `MAX_TOKENS` of the tokens: a copy where any are left out, or the whole would stay in memory."""
    total = len(seen.segments)
    if total <= MAX_TOKENS:
        return seen
    decided = min((verdict.token_index for verdict in verdicts), default=0)
    stop = min(max(decided + 1, MAX_TOKENS), total)
    part = slice(stop - MAX_TOKENS, stop)
    return Acts(seen.segments[part].copy(), np.array(seen.acts[part]))

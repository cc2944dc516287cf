"""The audit: every verdict other than allow is on the disk before the response that carries it is complete."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from feature_bank.layout import clean
from service.audit_store import AuditError, Row, iso
from service.audit_writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from guard.events import ActionName, FeatureHit, Phase, Verdict

__all__ = ["Audit", "AuditEntry", "AuditError", "AuditLog", "AuditMetrics", "NoAudit", "entries_of"]

_WRITE_SECONDS = 5.0
_LOG_SECONDS = 10.0
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One verdict, with whose request it was given in and when."""

    unix: float
    """Seconds since 1970, UTC."""
    request_id: str
    key_id: str | None
    endpoint: str
    phase: Phase
    choice: int
    """Number of the answer, or of the text, among those of the request."""
    action: ActionName
    domain: str
    rule: str
    score: float
    threshold: float
    token_index: int
    features: tuple[FeatureHit, ...]
    model: str
    bank: str
    policy: str
    text: str | None = None
    """The judged text; it is kept only by an audit that keeps texts."""

    def event(self) -> dict[str, Any]:
        """What `/v1/events` says of the entry: all but the text. Every number is finite, or None."""
        return {
            "type": "verdict",
            "time": iso(self.unix),
            "request_id": self.request_id,
            "key_id": self.key_id,
            "endpoint": self.endpoint,
            "phase": self.phase,
            "choice": self.choice,
            "action": self.action,
            "domain": self.domain,
            "rule": self.rule,
            "score": _number(self.score),
            "threshold": _number(self.threshold),
            "token_index": self.token_index,
            "features": _features(self.features),
            "model": self.model,
            "bank": self.bank,
            "policy": self.policy,
        }

    def row(self, *, text: bool) -> Row:
        """The entry as it is stored; without `text` the text is left out."""
        return (
            iso(self.unix),
            float(self.unix),
            clean(self.request_id),
            None if self.key_id is None else clean(self.key_id),
            clean(self.endpoint),
            self.phase,
            _integer(self.choice),
            self.action,
            clean(self.domain),
            clean(self.rule),
            _number(self.score),
            _number(self.threshold),
            _integer(self.token_index),
            json.dumps(_features(self.features), separators=(",", ":")),
            clean(self.model),
            clean(self.bank),
            clean(self.policy),
            clean(self.text) if text and self.text is not None else None,
        )


def entries_of(
    verdicts: Iterable[Verdict],
    *,
    request_id: str,
    key_id: str | None,
    endpoint: str,
    model: str,
    choice: int,
    text: str | None = None,
) -> list[AuditEntry]:
    """Return an entry for each of `verdicts` that is other than allow, all with the present time.

    `request_id` is the HTTP request's; the one in a verdict is the engine's own.
    """
    now = time.time()
    return [
        AuditEntry(
            unix=now,
            request_id=request_id,
            key_id=key_id,
            endpoint=endpoint,
            phase=verdict.phase,
            choice=choice,
            action=verdict.action,
            domain=verdict.domain,
            rule=verdict.rule,
            score=verdict.score,
            threshold=verdict.threshold,
            token_index=verdict.token_index,
            features=verdict.features,
            model=model,
            bank=verdict.bank_version,
            policy=verdict.policy_version,
            text=text,
        )
        for verdict in verdicts
        if verdict.action != "allow"
    ]


class AuditMetrics(Protocol):
    """What the audit counts; `guard.metrics.Metrics` does it."""

    def count_audit_entry(self) -> None:
        """Count an entry that was written."""

    def count_audit_error(self, on_error: str) -> None:
        """Count an entry that could not be written, under what the policy made of it."""


class AuditLog(Protocol):
    """What the routes see: an audit, or none."""

    async def write(self, entries: Sequence[AuditEntry]) -> None:
        """Return once `entries` are durable. Raises `AuditError` if they are not."""

    async def record(self, entries: Sequence[AuditEntry], on_error: str) -> bool:
        """Write `entries`; whether the response may go out. See `Audit.record`."""

    def close(self) -> None:
        """Write what waits and close."""


class NoAudit:
    """Where no audit is configured: nothing is written, and nothing fails."""

    async def write(self, entries: Sequence[AuditEntry]) -> None:
        """Write nothing."""

    async def record(self, entries: Sequence[AuditEntry], on_error: str) -> bool:  # noqa: ARG002 - as Audit's
        """Let every response go out."""
        return True

    def close(self) -> None:
        """Close nothing."""


class Audit:
    """The audit in one file, which other processes may be writing too; made by `open`."""

    def __init__(self, writer: Writer, *, text: bool, metrics: AuditMetrics, trouble: _Trouble) -> None:
        self._writer = writer
        self._text = text
        self._metrics = metrics
        self._trouble = trouble

    @classmethod
    def open(cls, path: Path, *, text: bool, days: int, metrics: AuditMetrics, logger: Any = None) -> Self:
        """Open the file at `path`, made with its folder if it is not there; may wait for other processes.

        `text` keeps the judged texts too; entries are removed after `days`, and never if that is 0.
        `logger` is a structlog logger. Raises `AuditError` for a file that is not an audit of this schema,
        or cannot be written, and for texts that would be kept for ever.
        """
        if text and not days:
            raise AuditError(
                "setting 'audit_text': texts are kept for a limited time only: set SAILGUARD_AUDIT_DAYS to 1 or more"
            )

        def count(rows: int) -> None:
            for _ in range(rows):
                metrics.count_audit_entry()

        trouble = _Trouble(logger)
        writer = Writer(path, days=days, on_written=count, on_trouble=trouble.add)
        return cls(writer, text=text, metrics=metrics, trouble=trouble)

    async def write(self, entries: Sequence[AuditEntry]) -> None:
        """Return once `entries` are on the disk: all of them, in their order.

        Raises `AuditError` if that failed or took more than a few seconds. After a timeout they may still come
        into the file later; they never do twice.
        """
        if not entries:
            return
        rows = [entry.row(text=self._text) for entry in entries]
        done = asyncio.wrap_future(self._writer.submit(rows))
        done.add_done_callback(_retrieve)
        # `wait` leaves the write alone when this task is cancelled or runs out of time.
        finished, _ = await asyncio.wait([done], timeout=_WRITE_SECONDS)
        if not finished:
            raise AuditError(f"the audit was not written within {_WRITE_SECONDS:g} s: its disk stalls")
        done.result()

    async def record(self, entries: Sequence[AuditEntry], on_error: str) -> bool:
        """Write `entries`, and say whether the response that carries the verdicts may go out.

        A failure is counted and logged, and is decided by the policy's `on_error`: with `block` the response
        must be replaced (False), with `flag` and `allow` it goes out (True). The next write is tried again.
        """
        try:
            await self.write(entries)
        except AuditError as error:
            for _ in entries:
                self._metrics.count_audit_error(on_error)
            self._trouble.add(error)
            return on_error in ("flag", "allow")
        if entries:
            self._trouble.over()
        return True

    def close(self) -> None:
        """Write what waits and close the file."""
        self._writer.close()


class _Trouble:
    """Logs failures: the first at once, then one line each few seconds, and the end of them."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._failures = 0
        self._logged_at = -math.inf

    def add(self, error: Exception) -> None:
        """Note a failure."""
        self._failures += 1
        now = time.monotonic()
        if self._logger is not None and now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            self._logger.error("audit not written", reason=str(error), failures=self._failures)

    def over(self) -> None:
        """Note a success."""
        if self._failures:
            if self._logger is not None:
                self._logger.info("audit written again", failures=self._failures)
            self._failures = 0
            self._logged_at = -math.inf


def _retrieve(done: asyncio.Future[None]) -> None:
    """Take the error of a write that nobody waits for any more, or asyncio would log it."""
    if not done.cancelled():
        done.exception()


def _features(hits: Iterable[FeatureHit]) -> list[dict[str, Any]]:
    return [
        {
            "id": clean(hit.id),
            "layer": hit.layer,
            "explanation": clean(hit.explanation),
            "activation": _number(hit.activation),
            "contribution": _number(hit.contribution),
        }
        for hit in hits
    ]


def _number(value: float) -> float | None:
    """The number, None if it is not finite: neither SQLite nor JSON has one for that."""
    return float(value) if math.isfinite(value) else None


def _integer(value: int) -> int:
    """The integer, within what SQLite stores."""
    return max(-_LARGEST, min(_LARGEST, int(value)))

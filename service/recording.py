"""What becomes of a verdict beside the response: the audit keeps it, and who listens to `/v1/events` is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.audit import entries_of
from service.auth import principal_of
from service.middleware import Record
from service.spool import Spooled

if TYPE_CHECKING:
    from starlette.requests import Request

    from feature_bank.layout import Role
    from guard.events import TextScore, Verdict
    from guard.metrics import Metrics
    from service.audit import AuditLog
    from service.engine import ServedEngine
    from service.events import EventBus
    from service.spool import Spooling

__all__ = ["Recorder", "count_score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Keeps the verdicts on one request."""

    audit: AuditLog
    events: EventBus
    request_id: str
    key_id: str | None
    endpoint: str
    """Short name, such as `chat`."""
    spool: Spooled = field(default_factory=Spooled.off)
    """Where what was judged is kept, as the guard saw it."""

    @classmethod
    def of(cls, request: Request, *, audit: AuditLog, events: EventBus, spool: Spooling, endpoint: str) -> Recorder:
        """The recorder of `request`."""
        principal = principal_of(request)
        request_id = Record.of(request).request_id
        return cls(
            audit=audit,
            events=events,
            request_id=request_id,
            key_id=None if principal is None else principal.key_id,
            endpoint=endpoint,
            spool=Spooled.of(spool, request_id, endpoint),
        )

    async def record(
        self, engine: ServedEngine, verdicts: Sequence[Verdict], *, choice: int = 0, text: str | None = None
    ) -> bool:
        """Keep the verdicts other than allow on choice, or text, number `choice`. Returns once they are durable.

        False: they could not be kept, and the policy wants nothing to go out then.
        """
        entries = entries_of(
            verdicts,
            request_id=self.request_id,
            key_id=self.key_id,
            endpoint=self.endpoint,
            model=engine.model_id,
            choice=choice,
            text=text,
        )
        if not entries:
            return True
        kept = await self.audit.record(entries, engine.policy.on_error)
        for entry in entries:
            self.events.publish(entry.event())
        return kept


def count_score(metrics: Metrics, score: TextScore, role: Role) -> None:
    """Add a text that was judged on its own to the metrics."""
    metrics.count_request("response" if role == "response" else "prompt", score.action)
    metrics.observe_scores(score.scores)
    for verdict in score.verdicts:
        metrics.count_verdict(verdict)

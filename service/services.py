"""What the routes share: the engine in its slot, the queue before it, and what keeps and shows the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from service.errors import not_ready
from service.recording import Recorder

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.audit import AuditLog
    from service.engine import AnsweringEngine, EngineSlot, ServedEngine
    from service.events import EventBus
    from service.peers import Peers
    from service.reload import Reloader
    from service.runner import Runner
    from service.settings import Settings
    from service.shadow import Shadow
    from service.slots import Slots
    from service.spool import Spooling
    from service.tracing import Tracing

__all__ = ["Services"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes share; it hangs on `app.state.services`."""

    settings: Settings
    metrics: Metrics
    runner: Runner
    slots: Slots
    slot: EngineSlot
    audit: AuditLog
    spool: Spooling
    shadow: Shadow
    events: EventBus
    reloader: Reloader
    tracing: Tracing
    peers: Peers

    @classmethod
    def of(cls, request: Request) -> Services:
        """Return the services of the application that serves `request`."""
        services = request.app.state.services
        assert isinstance(services, cls)
        return services

    def engine(self) -> ServedEngine:
        """Return the engine. Raises `ApiError` (503) while there is none."""
        if self.slot.engine is None:
            self.metrics.count_refusal("not_ready")
            raise not_ready(self.slot.reason)
        return self.slot.engine

    def answering_engine(self) -> AnsweringEngine:
        """Return the engine of a server that answers. Raises `ApiError` (503) while there is none."""
        engine = self.engine()
        assert engine.generates
        return cast("AnsweringEngine", engine)

    def recorder(self, request: Request, endpoint: str) -> Recorder:
        """What keeps the verdicts on `request`; endpoint: its short name."""
        return Recorder.of(request, audit=self.audit, events=self.events, spool=self.spool, endpoint=endpoint)

"""`GET /v1/stats`: what the metrics have counted since the server started, as one JSON object."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import AsciiJSONResponse
from service.schemas_about import GuardTime, Stats, TokenCounts
from service.schemas_errors import ERRORS
from service.services import Services

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/stats", summary="What has been counted", response_model=Stats, responses=ERRORS, tags=["operations"])
async def get_stats(request: Request) -> Response:
    """Verdicts, judged texts, tokens and the guard's own time, since the server started."""
    services = Services.of(request)
    engine = services.engine()
    counted = await asyncio.to_thread(_Counted, await services.peers.page())
    observed, generated = counted.total("tokens_observed_total"), counted.total("tokens_generated_total")
    seconds, steps = counted.total("step_overhead_seconds_sum"), counted.total("step_overhead_seconds_count")
    passes = counted.total("pass_seconds_total")
    stats = Stats(
        time=time.time(),
        verdicts=counted.table("verdicts_total", "domain", "action"),
        requests=counted.table("requests_total", "phase", "result"),
        errors=int(counted.total("errors_total")),
        tokens=TokenCounts(observed=int(observed), generated=int(generated)),
        coverage=observed / generated if generated else None,
        guard=GuardTime(
            seconds=seconds,
            steps=int(steps),
            mean_ms=1000 * seconds / steps if steps else None,
            share=seconds / passes if passes else None,
        ),
        in_flight=int(counted.total("requests_in_flight")),
        queued=int(counted.total("queue_depth")),
        bank=engine.bank_version,
        policy=engine.policy_version,
    )
    return AsciiJSONResponse(stats.model_dump(mode="json"))


class _Counted:
    """The samples of one page of metrics. Reading them takes a moment."""

    def __init__(self, page: bytes) -> None:
        from prometheus_client.parser import text_string_to_metric_families

        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(page.decode()):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def total(self, name: str) -> float:
        """The sum over all labels; 0 for what was never counted."""
        return sum(value for _, value in self._of(name))

    def table(self, name: str, row: str, column: str) -> dict[str, dict[str, int]]:
        """Counts by two labels."""
        found: dict[str, dict[str, int]] = {}
        for labels, value in self._of(name):
            counts = found.setdefault(labels[row], {})
            counts[labels[column]] = counts.get(labels[column], 0) + int(value)
        return found

    def _of(self, name: str) -> Iterable[tuple[dict[str, str], float]]:
        return self._samples.get(f"sailguard_{name}", ())

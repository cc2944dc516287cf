"""Whether the process lives, and whether the guard is in place."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.errors import not_ready
from service.schemas_errors import ERRORS, PROBES
from service.schemas_responses import HealthResponse, Readiness
from service.services import Services

__all__ = ["router"]

router = APIRouter()


@router.get(
    "/healthz", summary="Does the process live?", response_model=HealthResponse, responses=PROBES, tags=["operations"]
)
async def get_health() -> dict[str, str]:
    """Answer as long as the process lives."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Is the guard in place?",
    response_model=Readiness,
    responses={**PROBES, 503: ERRORS[503]},
    tags=["operations"],
)
async def get_readiness(request: Request) -> dict[str, str]:
    """Answer 200 once the guard is attached and its canary has passed, 503 with the reason before."""
    slot = Services.of(request).slot
    engine = slot.engine
    if engine is None:
        raise not_ready(slot.reason)
    return {
        "status": "ready",
        "model": engine.model_id,
        "bank": engine.bank_version,
        "policy": engine.policy_version,
    }

"""Whether the process lives, whether the guard is in place, and which model is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from service.errors import model_not_found
from service.runner import Services
from service.schemas import MODEL_ALIAS

__all__ = ["router"]

router = APIRouter()


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    """Answer as long as the process lives."""
    return {"status": "ok"}


@router.get("/readyz")
async def get_readiness(request: Request) -> dict[str, str]:
    """Answer 200 once the guard is attached and its canary has passed, 503 with the reason before."""
    engine = Services.of(request).engine()
    return {
        "status": "ready",
        "model": engine.model_id,
        "bank": engine.bank_version,
        "policy": engine.policy_version,
    }


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the names under which the served model answers."""
    engine = Services.of(request).engine()
    return {"object": "list", "data": [_model(name) for name in (engine.model_id, MODEL_ALIAS)]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describe one model name."""
    engine = Services.of(request).engine()
    if name not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(name)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sailguard"}

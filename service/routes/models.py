"""`GET /v1/models`: which model is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from service.errors import model_not_found
from service.schemas import MODEL_ALIAS
from service.schemas_errors import ERRORS
from service.schemas_responses import ModelEntry, ModelList
from service.services import Services

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models", summary="List the models", response_model=ModelList, responses=ERRORS, tags=["models"])
async def list_models(request: Request) -> dict[str, Any]:
    """List the names under which the served model answers."""
    engine = Services.of(request).engine()
    return {"object": "list", "data": [_model(name) for name in (engine.model_id, MODEL_ALIAS)]}


@router.get(
    "/v1/models/{name:path}", summary="Show one model", response_model=ModelEntry, responses=ERRORS, tags=["models"]
)
async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describe one model name."""
    engine = Services.of(request).engine()
    if name not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(name)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sailguard"}

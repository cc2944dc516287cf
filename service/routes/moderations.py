"""`POST /v1/moderations`: texts judged by the guard, in OpenAI's shape."""

from __future__ import annotations

import uuid
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import AsciiJSONResponse, model_not_found
from service.middleware import JsonRoute, Record
from service.runner import Services
from service.schemas import MODEL_ALIAS, ModerationRequest, moderation_result, strongest

if TYPE_CHECKING:
    from guard.events import TextScore
    from service.engine import ServedEngine

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_BATCH = 8


@router.post("/v1/moderations")
async def create_moderation(body: ModerationRequest, request: Request) -> Response:
    """Judge one text or several."""
    services = Services.of(request)
    engine = services.engine()
    if body.model is not None and body.model not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(body.model)
    job = services.runner.submit(lambda: _score(engine, body.input))
    results: list[dict[str, Any]] = []
    actions: list[str] = []
    try:
        async with job.until_disconnect(request):
            async for score in job:
                results.append(moderation_result(score))
                actions.append(score.action)
    finally:
        job.close()
    Record.of(request).action = strongest(actions)
    return AsciiJSONResponse(
        {
            "id": f"modr-{uuid.uuid4().hex}",
            "model": engine.model_id,
            "results": results,
            "sailguard": {"bank": engine.bank_version, "policy": engine.policy_version},
        }
    )


def _score(engine: ServedEngine, texts: list[str]) -> Generator[TextScore]:
    """Judge `texts` a few at a time, so that a request whose client is gone ends early."""
    for start in range(0, len(texts), _BATCH):
        yield from engine.score(texts[start : start + _BATCH])

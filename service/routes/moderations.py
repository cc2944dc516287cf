"""`POST /v1/moderations`: texts judged by the guard, in OpenAI's shape."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.attending import Deadline, attended
from service.errors import AsciiJSONResponse, audit_failed, model_not_found
from service.middleware import JsonRoute, Record
from service.recording import count_score
from service.schemas import ACTION_HEADER, MODEL_ALIAS, ModerationRequest, moderation_result, strongest
from service.schemas_errors import ERRORS
from service.schemas_responses import MODERATION_RESPONSES
from service.services import Services

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/moderations", summary="Judge texts", responses={**ERRORS, **MODERATION_RESPONSES}, tags=["judgements"]
)
async def create_moderation(body: ModerationRequest, request: Request) -> Response:
    """Judge one text or several."""
    services = Services.of(request)
    engine = services.engine()
    if body.model is not None and body.model not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(body.model)
    recorder = services.recorder(request, "moderations")
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    async with attended(request), deadline.kept():
        with services.tracing.span("judge", texts=len(body.input)):
            roles = [body.role] * len(body.input)
            scores = await services.runner.judge(engine, body.input, roles, keep=recorder.spool.keep)
    for number, (text, score) in enumerate(zip(body.input, scores, strict=True)):
        count_score(services.metrics, score, body.role)
        recorder.spool.text(engine, score, body.role, choice=number, text=text)
        if not await recorder.record(engine, score.verdicts, choice=number, text=text):
            raise audit_failed()
    action = strongest([score.action for score in scores])
    Record.of(request).action = action
    return AsciiJSONResponse(
        {
            "id": f"modr-{uuid.uuid4().hex}",
            "model": engine.model_id,
            "results": [moderation_result(score) for score in scores],
            "sailguard": {"bank": engine.bank_version, "policy": engine.policy_version},
        },
        headers={ACTION_HEADER: action},
    )

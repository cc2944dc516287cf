"""`POST /v1/completions`: plain text continued under the guard, whole or streamed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import model_not_found
from service.middleware import JsonRoute
from service.responses import respond
from service.schemas import MODEL_ALIAS, CompletionRequest
from service.schemas_errors import ERRORS
from service.schemas_responses import COMPLETION_RESPONSES
from service.services import Services
from service.wire import TextWire

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/completions", summary="Continue texts", responses={**ERRORS, **COMPLETION_RESPONSES}, tags=["answers"]
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one text or several under the guard."""
    engine = Services.of(request).answering_engine()
    if body.model not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(body.model)
    return await respond(
        request,
        engine,
        body,
        wire=TextWire(engine.model_id),
        endpoint="completions",
        prompts=lambda: [engine.text_ids(text) for text in body.prompt],
        texts=body.prompt,
        param="prompt",
    )

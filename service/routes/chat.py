"""`POST /v1/chat/completions`: guarded answers in OpenAI's shape, whole or streamed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import model_not_found
from service.middleware import JsonRoute
from service.responses import respond
from service.schemas import MODEL_ALIAS, ChatRequest
from service.schemas_errors import ERRORS
from service.schemas_responses import CHAT_RESPONSES
from service.services import Services
from service.wire import ChatWire

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Answer a chat", responses={**ERRORS, **CHAT_RESPONSES}, tags=["answers"])
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Generate an answer to a chat under the guard."""
    engine = Services.of(request).answering_engine()
    if body.model not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(body.model)
    messages = [message.for_model() for message in body.messages]
    return await respond(
        request,
        engine,
        body,
        wire=ChatWire(engine.model_id),
        endpoint="chat",
        prompts=lambda: [engine.prompt_ids(messages)],
        texts=["\n".join(message["content"] for message in messages)],
        param="messages",
    )

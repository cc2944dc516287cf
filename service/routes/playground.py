"""`POST /v1/playground`: a chat answered, or a text judged, with what the guard sees of every token."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse
from starlette.responses import Response

from service.answer_stream import AnswerStream
from service.answers import Choice
from service.attending import Deadline, attended
from service.auth import require_privileged
from service.errors import ApiError, audit_failed, context_length_exceeded
from service.middleware import JsonRoute, Record
from service.playground import TracedAnswer
from service.playground_events import Events, chat_events, text_events, to_the_end
from service.recording import count_score
from service.schemas_errors import ERRORS
from service.schemas_playground import PlaygroundRequest, event_schema
from service.services import Services

if TYPE_CHECKING:
    from guard.events import Phase
    from service.engine import AnsweringEngine, ServedEngine

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_PLAIN, _STEERED = "plain", "steered"
_SMALLEST_TOP_P = 1e-6
_SEEDS = 2**31
_EVENTS: dict[str, Any] = {
    "description": "Server-sent events, each a JSON object with its `type`: a `start`, for each run `tokens` and "
    "`verdict` events and an `end`, and at last `done`, or `error` where it could not be completed.",
    "content": {
        "text/event-stream": {
            # Of one event, for OpenAPI has no word yet for a sequence of them.
            "schema": {
                "type": "object",
                "properties": {
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": event_schema(),
                    }
                },
                "required": ["data"],
            }
        }
    },
}


@router.post(
    "/v1/playground",
    summary="Answer a chat, or judge a text, token by token",
    response_class=EventSourceResponse,
    responses={**ERRORS, 200: _EVENTS},
    tags=["judgements"],
)
async def play(body: PlaygroundRequest, request: Request) -> Response:
    """Stream what the guard sees of every token of a chat and its answer, or of a text.

    `steer` and `compare` change what the model says whatever the policy holds, and need an administrator's key.
    """
    services = Services.of(request)
    engine = services.engine()
    if not body.is_chat:
        return await _judge(request, services, engine, body, body.input)
    if body.steer:
        require_privileged(request)
    if not engine.generates or services.settings.upstream is not None:
        raise ApiError(
            409,
            "This server answers no chats of the playground, for its model only judges: send 'input' in place of "
            "'messages'.",
            param="messages",
            code="cannot_generate",
        )
    return await _answer(request, services, cast("AnsweringEngine", engine), body)


async def _judge(
    request: Request, services: Services, engine: ServedEngine, body: PlaygroundRequest, text: str
) -> Response:
    """Judge the text as a whole, and then tell of it token by token."""
    record = Record.of(request)
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    async with attended(request), deadline.kept(), services.slots.take():
        trace = await services.runner.call(lambda: engine.trace(text, body.role, top=None))
    count_score(services.metrics, trace.score, body.role)
    recorder = services.recorder(request, "playground")
    recorder.spool.text(engine, trace.score, body.role, choice=0, text=text)
    if not await recorder.record(engine, trace.score.verdicts, text=text):
        raise audit_failed()
    record.action = trace.score.action
    phase: Phase = "response" if body.role == "response" else "prompt"
    most = services.settings.max_input_tokens
    events = text_events(Events(engine, record.request_id), trace, run=_PLAIN, phase=phase, most=most)
    return AnswerStream(to_the_end(events, record), record, AsyncExitStack(), None)


async def _answer(request: Request, services: Services, engine: AnsweringEngine, body: PlaygroundRequest) -> Response:
    """Generate the runs side by side in one place, as the choices of a chat are."""
    record = Record.of(request)
    messages = [message.for_model() for message in body.messages]
    runs = [_PLAIN, _STEERED] if body.compare else [_STEERED] if body.steer else [_PLAIN]
    seed = secrets.randbelow(_SEEDS) if body.seed is None and body.temperature > 0 else body.seed

    def prepared() -> list[int]:
        if body.steer:
            engine.check_steering(body.steer)
        return engine.prompt_ids(messages)

    deadline = Deadline(services.settings.request_timeout, services.metrics)
    stack = AsyncExitStack()
    try:
        async with attended(request), deadline.kept():
            await stack.enter_async_context(services.slots.take())
            ids = await services.runner.call(prepared)
            text = "\n".join(message["content"] for message in messages)
            cap = services.settings.max_new_tokens
            choices = [_choice(engine, ids, text, body, cap, seed, steered=run == _STEERED) for run in runs]
            answer = TracedAnswer(engine, services.recorder(request, "playground"), choices)
            stack.callback(answer.close)
            with services.tracing.span("generate", choices=len(choices)):
                answer.start()
    except BaseException:
        await stack.aclose()
        raise
    events = chat_events(Events(engine, record.request_id), answer, runs, seed=seed, record=record, deadline=deadline)
    return AnswerStream(to_the_end(events, record), record, stack, answer)


def _choice(
    engine: AnsweringEngine,
    ids: list[int],
    text: str,
    body: PlaygroundRequest,
    cap: int,
    seed: int | None,
    *,
    steered: bool,
) -> Choice:
    from guard.serving import GenerationOptions

    room = engine.context_length - len(ids)
    if room < 1:
        raise context_length_exceeded(engine.context_length, len(ids))
    options = GenerationOptions(
        max_new_tokens=min(body.max_tokens, cap, room),
        temperature=body.temperature,
        top_p=max(body.top_p, _SMALLEST_TOP_P),
        seed=seed,
        steer=tuple(body.steer) if steered else (),
    )
    return Choice(ids=ids, options=options, prompt=text)

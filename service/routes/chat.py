"""`POST /v1/chat/completions`: guarded answers in OpenAI's shape, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from feature_bank.errors import SailguardError
from service.errors import (
    ApiError,
    AsciiJSONResponse,
    context_length_exceeded,
    internal_error,
    model_not_found,
)
from service.middleware import JsonRoute, Record
from service.runner import Job, Services
from service.schemas import ACTION_HEADER, MODEL_ALIAS, ChatRequest, guard_block, strongest, usage

if TYPE_CHECKING:
    from guard.events import SequenceReport
    from service.engine import ServedEngine

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


_SMALLEST_TOP_P = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prompt has been counted and fits."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text of choice `index`; `last` is set on the piece that ends it, then `text` is its closing text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Choice `index` is complete."""

    index: int
    finish_reason: Literal["stop", "length", "content_filter"]
    report: SequenceReport


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Generate an answer under the guard."""
    services = Services.of(request)
    engine = services.engine()
    if body.model not in (engine.model_id, MODEL_ALIAS):
        raise model_not_found(body.model)
    cap = services.settings.max_new_tokens
    job = services.runner.submit(lambda: _generate(engine, body, cap))
    try:
        async with job.until_disconnect(request):
            started = await anext(job)
            assert isinstance(started, Started)
            answer = _Answer(engine, body, started.prompt_tokens)
            if not body.stream:
                return await _whole(job, answer, Record.of(request))
    except BaseException:
        job.close()
        raise
    return _StreamedAnswer(job, answer, Record.of(request))


def _generate(engine: ServedEngine, body: ChatRequest, cap: int) -> Generator[Started | Piece | Ended]:
    """Generate the choices one after another; runs on the model thread."""
    messages = [message.for_model() for message in body.messages]
    prompt_tokens = engine.count_prompt(messages)
    room = engine.context_length - prompt_tokens
    if room < 1:
        raise context_length_exceeded(engine.context_length, prompt_tokens)
    yield Started(prompt_tokens=prompt_tokens)
    for index in range(body.n or 1):
        events = engine.stream(
            messages,
            max_new_tokens=min(body.token_limit or cap, cap, room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
            # Each choice has its own seed, or they would all be the same.
            seed=None if body.seed is None else (body.seed + index) % 2**63,
            stop=body.stop or (),
        )
        finish_reason: Literal["stop", "length", "content_filter"] = "stop"
        try:
            for event in events:
                yield Piece(index=index, text=event.text, finish_reason=event.finish_reason)
                if event.finish_reason is not None:
                    finish_reason = event.finish_reason
                    break
            # Let the engine write its report. Whatever it may still say after the end is dropped.
            next(events, None)
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
        yield Ended(index=index, finish_reason=finish_reason, report=engine.last_report())


class _Answer:
    """What the chunks and the whole of one answer share."""

    def __init__(self, engine: ServedEngine, body: ChatRequest, prompt_tokens: int) -> None:
        self.bank = engine.bank_version
        self.policy = engine.policy_version
        self.prompt_tokens = prompt_tokens
        self.include_usage = body.stream_options is not None and body.stream_options.include_usage
        self.reports: dict[int, SequenceReport] = {}
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": engine.model_id,
        }

    @property
    def action(self) -> str:
        return strongest([report.action for report in self.reports.values()])

    def usage(self) -> dict[str, int]:
        generated = sum(report.tokens_generated for report in self.reports.values())
        return usage(self.prompt_tokens, generated)

    def chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk


async def _whole(job: Job[Started | Piece | Ended], answer: _Answer, record: Record) -> Response:
    texts: dict[int, str] = {}
    choices = []
    async for item in job:
        if isinstance(item, Piece):
            # A blocked answer is the refusal alone: what came before is withheld.
            blocked = item.finish_reason == "content_filter"
            texts[item.index] = item.text if blocked else texts.get(item.index, "") + item.text
        elif isinstance(item, Ended):
            answer.reports[item.index] = item.report
            message = {"role": "assistant", "content": texts.get(item.index, ""), "refusal": None}
            choices.append(
                {
                    "index": item.index,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": item.finish_reason,
                }
            )
    record.action = answer.action
    body = {
        **answer.head,
        "object": "chat.completion",
        "choices": choices,
        "usage": answer.usage(),
        "sailguard": guard_block(answer.reports, answer.bank, answer.policy),
    }
    return AsciiJSONResponse(body, headers={ACTION_HEADER: answer.action})


async def _chunks(job: Job[Started | Piece | Ended], answer: _Answer, record: Record) -> AsyncIterator[dict[str, str]]:
    """Yield the server-sent events of one answer."""
    opened = -1
    try:
        async for item in job:
            if isinstance(item, Piece):
                if item.index != opened:
                    opened = item.index
                    yield _event(answer.chunk(opened, {"role": "assistant", "content": ""}))
                if item.text:
                    yield _event(answer.chunk(item.index, {"content": item.text}))
            elif isinstance(item, Ended):
                answer.reports[item.index] = item.report
                record.action = answer.action
                chunk = answer.chunk(item.index, {}, item.finish_reason)
                block = guard_block({item.index: item.report}, answer.bank, answer.policy)
                yield _event({**chunk, "sailguard": block})
    except Exception as error:  # noqa: BLE001 - it is logged and sent
        # The status line is sent already: the error goes out as an event, and without [DONE].
        record.fail(error)
        refusal = error if isinstance(error, ApiError) else internal_error()
        if isinstance(error, SailguardError):
            refusal = ApiError(500, "The guard ended the answer with an error.", kind="server_error")
        yield _event(refusal.body())
        return
    if answer.include_usage:
        last = {**answer.head, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage()}
        yield _event(last)
    yield {"data": "[DONE]"}


class _StreamedAnswer(EventSourceResponse):
    """Server-sent events of one job; however the response ends, the job ends with it."""

    def __init__(self, job: Job[Started | Piece | Ended], answer: _Answer, record: Record) -> None:
        super().__init__(_chunks(job, answer, record), sep="\n")
        self._job = job
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()
            if not self._job.finished:
                self._record.client_gone = True


def _event(data: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(data, allow_nan=False, separators=(",", ":"))}

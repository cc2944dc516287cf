"""A guarded answer as an HTTP response: whole, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from service.answer_stream import AnswerStream
from service.answers import Answer, Choice, Ended, Piece
from service.attending import Deadline, attended
from service.engine import AnsweringEngine
from service.errors import ApiError, AsciiJSONResponse, context_length_exceeded, internal_error
from service.middleware import Record
from service.schemas import ACTION_HEADER, GenerationRequest, guard_block, usage
from service.services import Services
from service.wire import Wire

__all__ = ["respond"]

_SMALLEST_TOP_P = 1e-6


async def respond(
    request: Request,
    engine: AnsweringEngine,
    body: GenerationRequest,
    *,
    wire: Wire,
    endpoint: str,
    prompts: Any,
    texts: Sequence[str],
    param: str,
) -> Response:
    """Generate `body.n` choices for each prompt, and answer with them.

    prompts: called on the model thread, gives the ids of every prompt. texts: the prompts themselves.
    param: the field that holds them.
    """
    services, record = Services.of(request), Record.of(request)
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    stack = AsyncExitStack()
    try:
        async with attended(request), deadline.kept():
            await stack.enter_async_context(services.slots.take())
            ids = await services.runner.call(prompts)
            choices = _choices(ids, texts, engine, body, services.settings.max_new_tokens, param)
            answer = Answer(engine, services.recorder(request, endpoint), choices)
            stack.callback(answer.close)
            with services.tracing.span("generate", choices=len(choices)):
                answer.start()
            shown = _Shown(wire, answer, body, prompt_tokens=sum(map(len, ids)))
            if not body.stream:
                return await shown.whole(record)
    except BaseException:
        await stack.aclose()
        raise
    finally:
        if not body.stream:
            await stack.aclose()
    return AnswerStream(shown.chunks(record, deadline), record, stack, answer)


def _choices(
    prompts: list[list[int]],
    texts: Sequence[str],
    engine: AnsweringEngine,
    body: GenerationRequest,
    cap: int,
    param: str,
) -> list[Choice]:
    from guard.serving import GenerationOptions

    choices = []
    for ids, text in zip(prompts, texts, strict=True):
        room = engine.context_length - len(ids)
        if room < 1:
            raise context_length_exceeded(engine.context_length, len(ids), param)
        for number in range(body.n or 1):
            options = GenerationOptions(
                max_new_tokens=min(body.token_limit or cap, cap, room),
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else max(body.top_p, _SMALLEST_TOP_P),
                # Each choice has its own seed, or they would all be the same.
                seed=None if body.seed is None else (body.seed + number) % 2**63,
                stop=tuple(body.stop or ()),
            )
            choices.append(Choice(ids=ids, options=options, prompt=text))
    return choices


class _Shown:
    """One answer in its shape on the wire."""

    def __init__(self, wire: Wire, answer: Answer, body: GenerationRequest, *, prompt_tokens: int) -> None:
        self.answer = answer
        self._wire = wire
        self._prompt_tokens = prompt_tokens
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self, record: Record) -> Response:
        """All of it as one response."""
        answer, wire = self.answer, self._wire
        texts = dict.fromkeys(range(len(answer.choices)), "")
        ended: dict[int, Ended] = {}
        async for item in answer.items():
            if isinstance(item, Piece):
                texts[item.index] += item.text
            else:
                ended[item.index] = item
                if item.finish_reason == "content_filter":  # the refusal alone: what came before is withheld
                    texts[item.index] = item.text
        record.action = answer.action
        choices = [wire.choice(index, texts[index], ended[index].finish_reason) for index in sorted(ended)]
        body = wire.whole(choices, usage=self._usage(), sailguard=self._block(answer.reports))
        return AsciiJSONResponse(body, headers={ACTION_HEADER: answer.action})

    async def chunks(self, record: Record, deadline: Deadline) -> AsyncIterator[dict[str, str]]:
        """The server-sent events of it."""
        answer, wire, opened = self.answer, self._wire, set[int]()
        items = answer.items()
        try:
            while True:
                async with deadline.kept():
                    item = await anext(items, None)
                if item is None:
                    break
                opening = None if item.index in opened else wire.opening(item.index)
                opened.add(item.index)
                if opening is not None:
                    yield self._event([opening])
                if item.text:
                    yield self._event([wire.delta(item.index, item.text)])
                if isinstance(item, Ended):
                    record.action = answer.action
                    block = self._block({item.index: item.report})
                    yield self._event([wire.ending(item.index, item.finish_reason)], sailguard=block)
        except Exception as error:  # noqa: BLE001 - it is logged and sent
            # The status line is sent already: the error goes out as an event, and without [DONE].
            record.fail(error)
            refusal = error if isinstance(error, ApiError) else internal_error()
            yield _data(refusal.body())
            return
        if self._include_usage:
            yield _data(wire.chunk([], usage=self._usage()))
        yield {"data": "[DONE]"}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, str]:
        if self._include_usage:
            more["usage"] = None
        return _data(self._wire.chunk(choices, **more))

    def _usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self.answer.generated)

    def _block(self, reports: Any) -> dict[str, Any]:
        return guard_block(reports, self.answer.engine.bank_version, self.answer.engine.policy_version)


def _data(data: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(data, allow_nan=False, separators=(",", ":"))}

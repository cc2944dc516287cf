"""The proxy: `POST /v1/chat/completions` and `/v1/completions` go to another server, and nothing unjudged passes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.attending import Deadline, attended
from service.errors import ApiError, AsciiJSONResponse, ClientGoneError, internal_error, model_not_found
from service.middleware import JsonRoute, Record
from service.proxy_answers import judged_answer, refused_answer, refused_events
from service.proxy_judging import Proxied
from service.proxy_stream import DONE, ProxiedStream
from service.proxy_texts import Asked, read_chat, read_completion
from service.schemas import ACTION_HEADER
from service.schemas_errors import UPSTREAM_ERRORS
from service.services import Services
from service.upstream import Upstream
from service.wire import ChatWire, TextWire, Wire

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)

_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Whatever the upstream server takes; all text in it is judged.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}
_LAST_WORD_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Endpoint:
    """What sets chats and completions apart."""

    name: str
    path: str
    read: Callable[[object], Asked]
    wire: type[Wire]


_CHAT = _Endpoint(name="chat", path="chat/completions", read=read_chat, wire=ChatWire)
_COMPLETIONS = _Endpoint(name="completions", path="completions", read=read_completion, wire=TextWire)


@router.post("/v1/chat/completions", responses=UPSTREAM_ERRORS, openapi_extra=_BODY, tags=["answers"])
async def proxy_chat_completion(request: Request) -> Response:
    """Have the upstream answer a chat, under the guard."""
    return await _answer(request, _CHAT)


@router.post("/v1/completions", responses=UPSTREAM_ERRORS, openapi_extra=_BODY, tags=["answers"])
async def proxy_completion(request: Request) -> Response:
    """Have the upstream continue texts, under the guard."""
    return await _answer(request, _COMPLETIONS)


@router.get("/v1/models", responses=UPSTREAM_ERRORS, tags=["models"])
async def proxy_models(request: Request) -> Response:
    """The models that the upstream has."""
    return await _look_up(request, "models")


@router.get("/v1/models/{model:path}", responses=UPSTREAM_ERRORS, tags=["models"])
async def proxy_model(model: str, request: Request) -> Response:
    """One of the models that the upstream has."""
    # Dots would lead to other places of the upstream.
    if any(part in ("", ".", "..") for part in model.split("/")):
        raise model_not_found(model)
    return await _look_up(request, f"models/{model}")


async def _look_up(request: Request, path: str) -> Response:
    services = Services.of(request)
    deadline = Deadline(services.settings.request_timeout, services.metrics)
    async with attended(request), deadline.kept(), _upstream(request).ask("GET", path, request.headers) as reply:
        await reply.check()
        return AsciiJSONResponse(await reply.json(), headers=reply.headers)


async def _answer(request: Request, endpoint: _Endpoint) -> Response:
    services = Services.of(request)
    proxied = Proxied(
        services=services,
        engine=services.engine(),
        recorder=services.recorder(request, endpoint.name),
        record=Record.of(request),
    )
    if "json" not in request.headers.get("content-type", ""):
        message = "Send the request as JSON with 'Content-Type: application/json'."
        raise ApiError(400, message, code="invalid_content_type")
    return _Exchange(request, endpoint, endpoint.read(await request.json()), proxied)


def _upstream(request: Request) -> Upstream:
    upstream = request.app.state.upstream
    assert isinstance(upstream, Upstream)
    return upstream


class _Exchange(Response):
    """One request, from its place in the queue to its last byte; all of it ends when the client goes away."""

    def __init__(self, request: Request, endpoint: _Endpoint, asked: Asked, proxied: Proxied) -> None:
        super().__init__()
        self._request = request
        self._endpoint = endpoint
        self._asked = asked
        self._proxied = proxied
        self._wire = endpoint.wire(asked.model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services, record = self._proxied.services, self._proxied.record
        deadline = Deadline(services.settings.request_timeout, services.metrics)
        stream = _Stream(send)
        try:
            async with attended(self._request), deadline.kept(), services.slots.take():
                whole = await self._exchange(stream)
                if whole is not None:
                    await whole(scope, receive, send)
        except ClientGoneError:
            if not stream.begun:
                raise
            record.client_gone = True
        except Exception as error:  # it is logged and sent
            if not stream.begun:
                raise
            record.fail(error)
            # The status line is sent already: the error goes out as an event, and without [DONE].
            refusal = error if isinstance(error, ApiError) else internal_error()
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await stream.send(refusal.body())
                await stream.end()

    async def _exchange(self, stream: _Stream) -> Response | None:
        """The answer, unless it has been streamed."""
        proxied, asked, wire = self._proxied, self._asked, self._wire
        await proxied.judge([(proxied.prompt, text) for text in asked.texts], asked.roles)
        proxied.count("prompt", proxied.prompt)
        if proxied.prompt.blocked:
            if not asked.streams:
                return refused_answer(proxied, asked, wire)
            await stream.begin({ACTION_HEADER: "block"})
            for event in refused_events(proxied, asked, wire):
                await stream.send(event)
            await stream.send(DONE)
            await stream.end()
            return None
        with proxied.services.tracing.span("upstream", choices=asked.choices):
            ask = _upstream(self._request).ask("POST", self._endpoint.path, self._request.headers, asked.body)
            async with ask as reply:
                await reply.check()
                # What the upstream sends counts, not what the client has asked for.
                if not reply.streams:
                    answer, headers = await reply.json(), reply.headers
                else:
                    await stream.begin(reply.headers)
                    hold_back = proxied.services.settings.hold_back
                    await ProxiedStream(
                        proxied,
                        reply,
                        wire,
                        choices=asked.choices,
                        hold_back=hold_back,
                        send=stream.send,
                        ping=stream.ping,
                    ).run()
                    await stream.end()
                    return None
        return await judged_answer(proxied, answer, wire, headers)


class _Stream:
    """Server-sent events on their way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send the status line and the headers."""
        self.begun = True
        # The last one keeps nginx from collecting events.
        own = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no"}
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in {**headers, **own}.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def send(self, event: Mapping[str, Any] | str) -> None:
        """Send one event."""
        data = event if isinstance(event, str) else json.dumps(event, allow_nan=False, separators=(",", ":"))
        await self._bytes(f"data: {data}\n\n".encode("ascii"))

    async def ping(self) -> None:
        """Send a comment, which clients skip."""
        await self._bytes(b": still here\n\n")

    async def end(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _bytes(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

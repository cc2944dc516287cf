"""What surrounds every route: request ids and logs, security headers, the body's size and pace, strict JSON."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_bank.layout import clean
from service.errors import body_too_slow, error_response, internal_error, invalid_json, too_large

if TYPE_CHECKING:
    from guard.metrics import Metrics

__all__ = ["BodyLimit", "JsonRoute", "Record", "RequestLog"]

_ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/moderations": "moderations",
    "/v1/traces": "traces",
    "/v1/events": "events",
    "/v1/about": "about",
    "/v1/stats": "stats",
    "/v1/compare": "compare",
    "/v1/playground": "playground",
}
_BRANCHES = {"/v1/features": "features", "/v1/models": "models", "/admin": "admin"}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
# A route that serves a page says itself what the page may load.
_UNLESS_SET = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CLIENT_GONE = 499
_DEEPEST_JSON = 64


@dataclass(slots=True)
class Record:
    """What is known of one request for its log line. It never holds text of a prompt or an answer.

    `principal` is the id of the key, never the key, and `role` what it may do. `refused` says which limit or check
    turned the request away, as `Metrics.count_refusal` names it.
    """

    request_id: str
    principal: str | None = None
    role: str | None = None
    refused: str | None = None
    status: int = 0
    action: str | None = None
    client_gone: bool = False
    error: str | None = None
    where: str | None = None

    @classmethod
    def of(cls, request: Request) -> Record:
        """Return the record of `request`."""
        record = request.scope["sailguard.record"]
        assert isinstance(record, cls)
        return record

    def fail(self, error: BaseException) -> None:
        """Note an error by its type and place; its message may quote a prompt and is left out."""
        self.error = type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            self.where = f"{frames[-1].filename}:{frames[-1].lineno}"


class RequestLog:
    """Outermost layer: request id, security headers, one log line and one observation a request.

    The id is always made here: what a client sends in `X-Request-Id` or `traceparent` could be anybody's, or anything.
    An exception that no handler took becomes a bare 500; its text stays out of response and log.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, logger: Any) -> None:
        self._app = app
        self._metrics = metrics
        self._logger = logger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        record = Record(f"req_{uuid.uuid4().hex}")
        scope["sailguard.record"] = record
        endpoint = _endpoint(scope["path"])
        if endpoint is not None:
            self._metrics.in_flight(1)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                for name, value in _UNLESS_SET.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - it is logged and answered
            record.fail(error)
            if record.status:
                return  # Half a response is out already; the server cuts the connection.
            await error_response(internal_error())(scope, receive, send_with_headers)
        finally:
            self._finish(scope, record, endpoint, time.monotonic() - began)

    def _finish(self, scope: Scope, record: Record, endpoint: str | None, seconds: float) -> None:
        status = _CLIENT_GONE if record.client_gone else record.status
        if endpoint is not None:
            self._metrics.in_flight(-1)
            self._metrics.observe_request(seconds, endpoint=endpoint, status=status)
        if record.refused is not None:
            self._metrics.count_refusal(record.refused)
        # The path is free text of the client's; the route's template is not.
        fields = {
            "request_id": record.request_id,
            "key_id": record.principal,
            "route": getattr(scope.get("route"), "path", None),
            "status": status,
            "action": record.action,
            "ms": round(seconds * 1000, 1),
        }
        if record.error is not None:
            self._logger.error("request", **fields, error=record.error, where=record.where)
        else:
            self._logger.info("request", **fields)


class BodyLimit:
    """Refuses bodies over `limit` bytes, by their declared length or as soon as they grow beyond it, and bodies that
    are not complete after `seconds`."""

    def __init__(self, app: ASGIApp, *, limit: int, seconds: float | None = None) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["sailguard.record"]
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limit:
            record.refused = "size"
            await error_response(too_large(self._limit))(scope, receive, send)
            return
        received, complete = 0, False
        deadline = None if self._seconds is None else asyncio.get_running_loop().time() + self._seconds

        async def counted() -> Message:
            nonlocal received, complete
            if complete:  # what is still to come is the end of the connection, which may take as long as it likes
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                assert self._seconds is not None
                record.refused = "timeout"
                raise body_too_slow(self._seconds) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self._limit:
                    record.refused = "size"
                    raise too_large(self._limit)
            return message

        await self._app(scope, counted, send)


class _JsonRequest(Request):
    """A request whose JSON is read strictly: UTF-8, no NaN, bounded depth, lone surrogates replaced."""

    async def json(self) -> Any:
        try:
            text = (await self.body()).decode("utf-8")
            value = json.loads(text, parse_constant=_refuse_constant)
            if text.count("[") + text.count("{") > _DEEPEST_JSON:
                _refuse_deep(value)
            # Strict UTF-8 holds no surrogates, so only an escape can bring one in.
            return _without_surrogates(value) if "\\u" in text else value
        except UnicodeDecodeError:
            raise invalid_json("it is not UTF-8") from None
        except RecursionError:
            raise invalid_json("it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
        except ValueError:
            raise invalid_json("it holds a number that is out of range") from None


class JsonRoute(APIRoute):
    """A route that reads its body with `_JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the route's handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


def _endpoint(path: str) -> str | None:
    """The short name under which a request is counted; none for a path that is nobody's or not worth it."""
    if path in _ENDPOINTS:
        return _ENDPOINTS[path]
    return next((name for place, name in _BRANCHES.items() if path == place or path.startswith(f"{place}/")), None)


def _refuse_deep(value: Any) -> None:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(_DEEPEST_JSON):
        inner = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in inner if isinstance(item, (list, dict))]
        if not level:
            return
    raise RecursionError


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value

"""What surrounds every route: request ids and logs, security headers, API keys, body limit, strict JSON."""

from __future__ import annotations

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
from service.errors import error_response, internal_error, invalid_json, invalid_key, too_large

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.settings import KeyRing

__all__ = ["BodyLimit", "JsonRoute", "KeyCheck", "Record", "RequestLog"]

_ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/moderations": "moderations"}
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_CLIENT_GONE = 499


@dataclass(slots=True)
class Record:
    """What is known of one request for its log line. It never holds text of a prompt or an answer."""

    request_id: str
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

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
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
            self._finish(scope, record, time.monotonic() - began)

    def _finish(self, scope: Scope, record: Record, seconds: float) -> None:
        status = _CLIENT_GONE if record.client_gone else record.status
        endpoint = _ENDPOINTS.get(scope["path"])
        if endpoint is not None:
            self._metrics.observe_request(seconds, endpoint=endpoint, status=status)
        # The path is free text of the client's; the route's template is not.
        fields = {
            "request_id": record.request_id,
            "route": getattr(scope.get("route"), "path", None),
            "status": status,
            "action": record.action,
            "ms": round(seconds * 1000, 1),
        }
        if record.error is not None:
            self._logger.error("request", **fields, error=record.error, where=record.where)
        else:
            self._logger.info("request", **fields)


class KeyCheck:
    """Refuses requests without an accepted API key, before their body is read. Without keys all may pass."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_metrics: bool) -> None:
        self._app = app
        self._keys = keys
        self._open = _OPEN_PATHS | ({"/metrics"} if open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        guarded = scope["type"] == "http" and self._keys and scope["path"] not in self._open
        if guarded and not self._accepts(scope):
            await error_response(invalid_key())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _accepts(self, scope: Scope) -> bool:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (found[0] if len(found) == 1 else b"").partition(b" ")
        return scheme.lower() == b"bearer" and self._keys.accepts(key.strip())


class BodyLimit:
    """Refuses bodies over `limit` bytes: by their declared length, or as soon as they grow beyond it."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limit:
            await error_response(too_large(self._limit))(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise too_large(self._limit)
            return message

        await self._app(scope, counted, send)


class _JsonRequest(Request):
    """A request whose JSON is read strictly: UTF-8, no NaN, bounded depth, lone surrogates replaced."""

    async def json(self) -> Any:
        try:
            text = (await self.body()).decode("utf-8")
            value = json.loads(text, parse_constant=_refuse_constant)
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

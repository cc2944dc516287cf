"""HTTP errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` for every refusal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

from feature_bank.errors import SailguardError

__all__ = [
    "ApiError",
    "AsciiJSONResponse",
    "ClientGoneError",
    "SettingsError",
    "admin_closed",
    "admin_needed",
    "audit_failed",
    "body_too_slow",
    "context_length_exceeded",
    "error_response",
    "forbidden",
    "host_not_allowed",
    "install_error_handlers",
    "internal_error",
    "invalid_json",
    "invalid_key",
    "model_not_found",
    "not_ready",
    "origin_not_allowed",
    "overloaded",
    "rate_limited",
    "timed_out",
    "too_large",
    "too_many_open",
]


class SettingsError(SailguardError, ValueError):
    """A setting is missing, malformed or unsafe. The message names the setting and says what to do."""


class ClientGoneError(Exception):
    """The client closed the connection before its response was complete."""


class ApiError(HTTPException):
    """One refusal: `status_code` plus the four fields of OpenAI's error object (`kind` is its `type`).

    The message names the parameter and says what to do; it never quotes a prompt.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, detail=message, headers=headers)
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON body of this refusal."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class AsciiJSONResponse(JSONResponse):
    """JSON with every non-ASCII character escaped: text that UTF-8 cannot carry never fails a response."""

    def render(self, content: Any) -> bytes:
        """Encode `content`; NaN and infinity are errors."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: ApiError) -> AsciiJSONResponse:
    """Turn a refusal into its HTTP response."""
    return AsciiJSONResponse(error.body(), status_code=error.status_code, headers=error.headers)


def model_not_found(model: str) -> ApiError:
    """404 for a model name that is not served here."""
    message = f"The model '{model[:200]}' does not exist or you do not have access to it; see GET /v1/models."
    return ApiError(404, message, param="model", code="model_not_found")


def invalid_key() -> ApiError:
    """401 for a missing or unknown API key."""
    message = "Incorrect API key provided: send one of the server's keys as 'Authorization: Bearer KEY'."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def forbidden(role: str) -> ApiError:
    """403 for a key whose role does not open the endpoint."""
    message = f"A key of the role '{role}' may not do this: use a key of another role; docs/server.md has the table."
    return ApiError(403, message, code="insufficient_permissions")


def admin_closed() -> ApiError:
    """403 for `/admin` of a server that has no key for it."""
    message = "The server has no admin key, so /admin is closed: set SAILGUARD_ADMIN_KEYS, or make a key of that role."
    return ApiError(403, message, code="admin_closed")


def admin_needed() -> ApiError:
    """403 for what a server with keys does for administrators alone, though it does not lie below `/admin`."""
    message = "This needs an admin key: send one, or start the server on loopback without any keys."
    return ApiError(403, message, code="insufficient_permissions")


def host_not_allowed() -> ApiError:
    """403 for a `Host` that is not this machine; a page that rebinds its own name to it must not get through."""
    message = (
        "A server without keys answers only to this machine's own names, such as localhost and 127.0.0.1: "
        "use one of them, or add the name to SAILGUARD_ALLOWED_HOSTS."
    )
    return ApiError(403, message, code="host_not_allowed")


def origin_not_allowed() -> ApiError:
    """403 for a request that a page of another site makes in somebody's browser."""
    message = "A server without keys takes no requests of other sites' pages: see SAILGUARD_CORS_ORIGINS."
    return ApiError(403, message, code="origin_not_allowed")


def body_too_slow(seconds: float) -> ApiError:
    """408 for a body that was not complete after `seconds`; the connection is closed."""
    message = f"The request body was not complete after {seconds:g} s."
    return ApiError(408, message, code="request_timeout", headers={"Connection": "close"})


def rate_limited(retry_after: int, rate: str) -> ApiError:
    """429 for a sender who has used up `rate`; `retry_after` is in seconds."""
    message = f"The limit of {rate} is reached: try again in {retry_after} s."
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def too_many_open(most: int) -> ApiError:
    """429 for a sender who has `most` requests open already."""
    message = f"There are {most} open requests already, which is the limit: wait for one to end."
    headers = {"Retry-After": "1"}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def too_large(limit: int) -> ApiError:
    """413 for a body over `limit` bytes; the connection is closed, since the rest of it stays unread."""
    message = f"The request body is larger than {limit} bytes: send less text, or raise max_body_bytes."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def overloaded(retry_after: int) -> ApiError:
    """429 for a full queue; `retry_after` is in seconds."""
    message = f"The server's queue is full: try again in {retry_after} s."
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def not_ready(reason: str) -> ApiError:
    """503 while no guard is attached; `reason` says why."""
    headers = {"Retry-After": "2"}
    return ApiError(503, reason, kind="service_unavailable", code="not_ready", headers=headers)


def timed_out(seconds: float) -> ApiError:
    """504 for a request that took longer than it may."""
    message = f"The request took longer than {seconds:g} s: ask for fewer tokens, or raise request_timeout."
    return ApiError(504, message, kind="timeout_error", code="request_timeout")


def audit_failed() -> ApiError:
    """503 for a verdict that could not be put on record, under a policy that wants it to be."""
    message = "The verdict could not be put on record, so nothing goes out: see the server's log."
    headers = {"Retry-After": "5"}
    return ApiError(503, message, kind="server_error", code="audit_failed", headers=headers)


def context_length_exceeded(limit: int, tokens: int, param: str = "messages") -> ApiError:
    """400 for a prompt of `tokens` tokens that leaves no room in a context of `limit` tokens."""
    message = (
        f"This model's maximum context length is {limit} tokens, but the {param} holds {tokens} tokens "
        f"and at least one has to be left for the answer: shorten the {param}."
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def invalid_json(problem: str) -> ApiError:
    """400 for a body that is not JSON."""
    return ApiError(400, f"The request body is not valid JSON: {problem}.", code="invalid_json")


def internal_error() -> ApiError:
    """500 without any detail: the reason stands in the server's log under the request id."""
    message = "The server had an error while processing the request; its log names it by X-Request-Id."
    return ApiError(500, message, kind="server_error", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Give every error that `app` raises OpenAI's shape."""
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(ClientGoneError, _on_client_gone)


async def _on_http_error(request: Request, error: Exception) -> AsciiJSONResponse:
    if isinstance(error, ApiError):
        return error_response(error)
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 404:
        message, code = "Unknown request URL: see docs/server.md for the endpoints.", "unknown_url"
    elif error.status_code == 405:
        message, code = f"Not allowed to {request.method} on this URL.", "method_not_supported"
        return error_response(ApiError(405, message, code=code, headers={"Allow": _allowed(request)}))
    else:
        message, code = str(error.detail), "invalid_request"
    return error_response(ApiError(error.status_code, message, code=code, headers=error.headers))


def _allowed(request: Request) -> str:
    """The methods of all routes of the path; each route by itself knows its own alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = {
        method
        for route in routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return ", ".join(sorted(found))


async def _on_invalid_request(request: Request, error: Exception) -> AsciiJSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = first["loc"][1:] if first["loc"][:1] and first["loc"][0] in ("body", "query", "path") else first["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    param = path.lstrip(".") or None
    context = first.get("ctx") or {}
    message = str(first["msg"]).removeprefix("Value error, ")
    if param is None and "json" not in request.headers.get("content-type", ""):
        message = "Send the request as JSON with 'Content-Type: application/json'."
        return error_response(ApiError(400, message, code="invalid_content_type"))
    if "param" in context:
        return error_response(ApiError(400, message, param=context["param"], code=first["type"]))
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return error_response(ApiError(400, f"{param or 'request body'}: {message}.", param=param, code=code))


async def _on_client_gone(_request: Request, _error: Exception) -> AsciiJSONResponse:
    """Nobody reads this answer; its status marks the request in the log."""
    gone = ApiError(499, "The client closed the connection.", kind="client_error", code="client_closed")
    return error_response(gone)

"""Refusals as they stand in the OpenAPI document: OpenAI's error object under every status that a route may answer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["ERRORS", "PROBES", "UPSTREAM_ERRORS", "ErrorBody", "ErrorResponse"]


class ErrorBody(BaseModel):
    """What was refused, and what to do about it."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every refusal."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


def _refusal(description: str) -> dict[str, Any]:
    return {"model": ErrorResponse, "description": description}


# FastAPI asks for a plain dict with these keys.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: _refusal("The request is malformed; `param` names the field."),
    401: _refusal("The API key is missing or unknown."),
    403: _refusal("The key may not do this."),
    404: _refusal("There is no such thing."),
    408: _refusal("The request's body took too long to come; the connection is closed."),
    409: _refusal("The server's state does not allow it, or a new version was refused and the old one serves on."),
    413: _refusal("The request body is too large."),
    429: _refusal("Too many requests; `Retry-After` says when to try again."),
    500: _refusal("The server had an error; its log names it by `X-Request-Id`."),
    503: _refusal("No guard is attached yet, or the server is shutting down."),
    504: _refusal("The request took longer than the server allows."),
}
"""For `responses=` of a route."""

PROBES: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (403, 500)}
"""For those of a route that needs no key: of a host or a page that may not ask, and of a failure."""

UPSTREAM_ERRORS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    502: _refusal("The upstream server cannot be reached, or does not accept this server's key."),
}
"""For those of a route that another server answers."""

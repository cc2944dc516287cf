"""`GET /v1/events`: verdicts as they are given, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.auth import Role, principal_of
from service.events import Event, Subscription
from service.schemas_errors import ERRORS
from service.services import Services

__all__ = ["router"]

router = APIRouter()

_PING_SECONDS = 15
_SEND_SECONDS = 60
"""How long a client may leave what was sent unread before its connection is cut."""


@router.get(
    "/v1/events",
    response_class=EventSourceResponse,
    responses={
        **ERRORS,
        200: {
            "description": "Events, each a JSON object, until one side closes the connection.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    },
    tags=["judgements"],
)
async def stream_events(
    request: Request,
    action: Annotated[
        list[Literal["flag", "steer", "block"]] | None, Query(description="Only verdicts with this action.")
    ] = None,
    domain: Annotated[list[str] | None, Query(description="Only verdicts about this domain.")] = None,
) -> Response:
    """Stream this process's verdicts from now on. Texts are never part of them, key ids are for admins alone."""
    actions, domains = frozenset(action or ()), frozenset(domain or ())

    def wants(event: Event) -> bool:
        return (not actions or event.get("action") in actions) and (not domains or event.get("domain") in domains)

    principal = principal_of(request)
    admin = principal is not None and principal.role is Role.ADMIN
    return _EventStream(Services.of(request).events.subscribe(wants), admin=admin)


class _EventStream(EventSourceResponse):
    """The events of one subscription; however the response ends, the subscription ends with it."""

    def __init__(self, subscription: Subscription, *, admin: bool) -> None:
        super().__init__(_events(subscription, admin), sep="\n", ping=_PING_SECONDS, send_timeout=_SEND_SECONDS)
        self._subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            pass  # A client that reads no more is no error of the server's.
        finally:
            self._subscription.close()


async def _events(subscription: Subscription, admin: bool) -> AsyncIterator[dict[str, str]]:
    async for event in subscription:
        shown = {name: value for name, value in event.items() if name != "text" and (admin or name != "key_id")}
        yield {"data": json.dumps(shown, allow_nan=False, separators=(",", ":"))}

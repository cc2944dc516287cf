"""The response that streams an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from service.answers import Answer
    from service.middleware import Record

__all__ = ["AnswerStream"]

_SEND_SECONDS = 60
"""How long a client may leave what was sent unread before its connection is cut."""
_DRAIN_SECONDS = 25
"""How long an answer may go on once the server is to end; less than the server itself waits."""


class AnswerStream(EventSourceResponse):
    """Server-sent events of one answer; however the response ends, the answer and its place end with it.

    stack: holds the place, and what else ends with the response. answer: none where a text was judged.
    """

    def __init__(
        self, events: AsyncIterator[dict[str, str]], record: Record, stack: AsyncExitStack, answer: Answer | None
    ) -> None:
        super().__init__(events, sep="\n", send_timeout=_SEND_SECONDS, shutdown_grace_period=_DRAIN_SECONDS)
        self._record = record
        self._stack = stack
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()
            answer = self._answer
            if answer is not None and len(answer.reports) < len(answer.choices) and self._record.error is None:
                self._record.client_gone = True

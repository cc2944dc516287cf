"""A request that ends with its client, and with its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.requests import Request

from service.errors import ClientGoneError, timed_out

if TYPE_CHECKING:
    from guard.metrics import Metrics

__all__ = ["Deadline", "attended"]


class Deadline:
    """When a request has to have its answer."""

    def __init__(self, seconds: float, metrics: Metrics) -> None:
        self._seconds = seconds
        self._metrics = metrics
        self._at = asyncio.get_running_loop().time() + seconds

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Within this context nothing goes on after the deadline. Raises `ApiError` (504) then.

        It must not span the `yield` of an async generator.
        """
        timeout = asyncio.timeout_at(self._at)
        try:
            async with timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            self._metrics.count_refusal("timeout")
            raise timed_out(self._seconds) from None


@asynccontextmanager
async def attended(request: Request) -> AsyncIterator[None]:
    """Within this context the work ends when the client goes away: with a `ClientGoneError`.

    The body must have been read.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGoneError("the client closed the connection") from None
        raise
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])

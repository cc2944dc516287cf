"""Places for answers: so many side by side, so many more that wait, and no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.errors import overloaded
from service.runner import retry_after

if TYPE_CHECKING:
    from guard.metrics import Metrics

__all__ = ["Slots"]


class Slots:
    """First come, first served. The methods belong to the event loop's thread."""

    def __init__(self, *, max_running: int, max_waiting: int, metrics: Metrics) -> None:
        self._free = asyncio.Semaphore(max_running)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._typical_seconds = 1.0
        self.taken = 0
        """Places in use."""
        self.waiting = 0
        """Requests that wait for one."""

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold a place within this context, which begins when one is free.

        Raises `ApiError` (429, with Retry-After) if as many wait as may.
        """
        if self._free.locked() and self.waiting >= self._max_waiting:
            self._metrics.count_refusal("queue")
            raise overloaded(retry_after(self._typical_seconds * (1 + self.waiting / self._max_running)))
        self.waiting += 1
        self._metrics.queued(1)
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
            self._metrics.queued(-1)
        began = time.monotonic()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._free.release()
            self._typical_seconds += 0.2 * (time.monotonic() - began - self._typical_seconds)

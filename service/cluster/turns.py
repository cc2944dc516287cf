"""Turns: one replica at a time loads a new version, while the others answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["LEASE_SECONDS", "NAME", "WAIT_SECONDS", "Turns", "turn_of"]

NAME = "Turns"
LEASE_SECONDS = 60.0
"""How long a turn lasts at most: whoever holds it may have died."""
WAIT_SECONDS = 300.0
"""How long a replica waits for its turn; then it loads without: better two at once than an old version for good."""


class Turns:
    """Who may load. A deployment of its own, of one replica; what it knows may be lost without harm."""

    def __init__(self, lease: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._holder: str | None = None
        self._until = 0.0
        self._freed = asyncio.Condition()

    async def take(self, who: str) -> None:
        """Return once it is the turn of `who`, until `give` or the end of the lease."""
        async with self._freed:
            while self._holder not in (None, who) and (left := self._until - self._clock()) > 0:
                try:
                    await asyncio.wait_for(self._freed.wait(), left)
                except TimeoutError:
                    continue
            self._holder, self._until = who, self._clock() + self._lease

    async def give(self, who: str) -> None:
        """End the turn of `who`, if it is still theirs."""
        async with self._freed:
            if self._holder == who:
                self._holder = None
                self._freed.notify()


@asynccontextmanager
async def turn_of(who: str, turns: Any, logger: Any, *, patience: float = WAIT_SECONDS) -> AsyncIterator[None]:
    """Hold the turn of replica `who` for the time of the context; without it, if it cannot be had.

    turns: the handle of the deployment `Turns`.
    """
    try:
        async with asyncio.timeout(patience):
            await turns.take.remote(who)
    except Exception as error:  # noqa: BLE001 - a turn spreads work, and must not keep a version out
        logger.warning("loading out of turn", reason=type(error).__name__)
        yield
        return
    try:
        yield
    finally:
        try:
            async with asyncio.timeout(patience):
                await turns.give.remote(who)
        except Exception as error:  # noqa: BLE001 - the lease ends by itself
            logger.warning("turn not given back", reason=type(error).__name__)

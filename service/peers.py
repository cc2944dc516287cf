"""The other processes behind the same address: whose turn it is to load, and everybody's metrics on one page."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from guard.metrics import Metrics

__all__ = ["Alone", "Peers"]


class Peers(Protocol):
    """What an application knows of those that serve beside it."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Held while a new version is loaded, so that one process at a time is busy with it."""

    async def page(self) -> bytes:
        """Every series of all processes, in Prometheus' text format."""


class Alone:
    """No others, or workers of one supervisor: they load when they like, and share the files of their metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def turn(self) -> AbstractAsyncContextManager[None]:
        """At once."""
        return nullcontext()

    async def page(self) -> bytes:
        """The series of this process, or of the workers."""
        return await asyncio.to_thread(self._metrics.render)

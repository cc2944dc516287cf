"""Verdicts as they are given, handed to whoever listens; a listener that is slow never holds up a request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from service.errors import ApiError

__all__ = ["Event", "EventBus", "Subscription"]

Event = Mapping[str, Any]
"""One event, JSON-ready; `type` says what it is. Listeners share it and do not alter it."""


class EventBus:
    """Hands each event to every subscriber that wants it. All of it belongs to one event loop's thread.

    `queue` events wait for a subscriber; then the oldest are lost to it, and to it alone.
    """

    def __init__(self, *, max_subscribers: int = 64, queue: int = 256) -> None:
        self._max_subscribers = max_subscribers
        self._queue = queue
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @property
    def subscribers(self) -> int:
        """How many listen."""
        return len(self._subscriptions)

    def publish(self, event: Event) -> None:
        """Hand `event` to the subscribers; never waits."""
        for subscription in self._subscriptions:
            subscription.put(event)

    def subscribe(self, wants: Callable[[Event], bool] | None = None) -> Subscription:
        """Listen to the events that `wants` says yes to, or to all, from now until the subscription is closed.

        Raises `ApiError`: 429 if too many listen already, 503 after `close`.
        """
        if self._closed:
            raise ApiError(503, "The server is shutting down.", kind="service_unavailable", code="not_ready")
        if len(self._subscriptions) >= self._max_subscribers:
            raise ApiError(
                429,
                f"{self._max_subscribers} clients listen to the events already: close one, or try again later.",
                kind="rate_limit_error",
                code="too_many_subscribers",
                headers={"Retry-After": "10"},
            )
        subscription = Subscription(self._queue, wants, on_close=self._subscriptions.discard)
        self._subscriptions.add(subscription)
        return subscription

    def close(self) -> None:
        """End every subscription once what waits for it has been read, and take no new ones."""
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()


class Subscription:
    """The events for one listener: `async with bus.subscribe() as events: async for event in events`."""

    def __init__(
        self, queue: int, wants: Callable[[Event], bool] | None, *, on_close: Callable[[Subscription], None]
    ) -> None:
        self._events: deque[Event] = deque()
        self._queue = queue
        self._wants = wants
        self._on_close = on_close
        self._lost = 0
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, event: Event) -> None:
        """Queue `event` if it is wanted; the oldest one makes room for it."""
        if self._wants is not None and not self._wants(event):
            return
        if len(self._events) >= self._queue:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._changed.set()

    def close(self) -> None:
        """Listen no more; may be called more than once."""
        self._closed = True
        self._changed.set()
        self._on_close(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        """Return the next event; before those that are left, `{"type": "dropped", "count": n}` if n were lost."""
        while True:
            if self._lost:
                count, self._lost = self._lost, 0
                return {"type": "dropped", "count": count}
            if self._events:
                return self._events.popleft()
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()

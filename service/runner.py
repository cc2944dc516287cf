"""All model work happens on one thread, one job at a time; this module queues it and hands results back.

A job is a generator. It runs on the model thread at the model's own pace, whatever the client's reading
speed, and what it yields reaches the event loop through an async iterator. Closing a job takes a waiting
one out of the queue and ends a running one after its current step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from starlette.requests import Request

from service.errors import ClientGoneError, not_ready, overloaded

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.engine import EngineSlot, ServedEngine
    from service.settings import Settings

__all__ = ["Job", "Runner", "Services"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """Last entry of a job's queue; `error` is raised in the reader."""

    error: BaseException | None = None


class Job(Generic[T]):
    """One unit of model work, read with `async for` on the event loop that submitted it."""

    def __init__(self, work: Callable[[], Generator[T]], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self._entries: asyncio.Queue[T | _End] = asyncio.Queue()
        self._stop = threading.Event()
        self._future: Future[None] | None = None
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether everything that the job yielded has been read."""
        return self._finished

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        if self._finished:
            raise StopAsyncIteration
        entry = await self._entries.get()
        if isinstance(entry, _End):
            self._finished = True
            if entry.error is not None:
                raise entry.error
            raise StopAsyncIteration
        return entry

    def close(self) -> None:
        """End the job. May be called at any time and more than once, on the event loop's thread."""
        self._stop.set()
        if self._future is not None:
            self._future.cancel()

    def abandon(self) -> None:
        """End the job because its client is gone: the reader gets a `ClientGoneError`."""
        self.close()
        self._entries.put_nowait(_End(ClientGoneError("the client closed the connection")))

    @contextlib.asynccontextmanager
    async def until_disconnect(self, request: Request) -> AsyncIterator[None]:
        """Abandon the job if the client goes away inside the `with` block. The body must have been read."""
        watcher = asyncio.create_task(self._watch(request))
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.abandon()

    def run(self) -> None:
        """Do the work; called once, on the model thread."""
        if self._stop.is_set():
            return
        with contextlib.closing(self._work()) as items:
            for item in items:
                if self._stop.is_set():
                    return
                self._loop.call_soon_threadsafe(self._entries.put_nowait, item)

    def start(self, executor: ThreadPoolExecutor, on_end: Callable[[], None]) -> None:
        """Queue the job; `on_end` is called on the event loop once it holds the model thread no more."""

        def ended(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            # A loop that is closed already has no reader left.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(finish, error)

        def finish(error: BaseException | None) -> None:
            on_end()
            self._entries.put_nowait(_End(error))

        self._future = executor.submit(self.run)
        self._future.add_done_callback(ended)


class Runner:
    """The model thread and the bounded queue in front of it.

    At most one job runs and `max_queue` wait. The methods belong to the event loop's thread.
    """

    def __init__(self, *, max_queue: int, metrics: Metrics) -> None:
        self._max_queue = max_queue
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sailguard-model")
        self._jobs: set[Job[Any]] = set()
        self._typical_seconds = 1.0

    @property
    def pending(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    def submit(self, work: Callable[[], Generator[T]]) -> Job[T]:
        """Queue `work`. Raises `ApiError` (429, with Retry-After) if the queue is full."""
        if len(self._jobs) > self._max_queue:
            seconds = math.ceil(self._typical_seconds * len(self._jobs))
            raise overloaded(min(max(seconds, 1), 60))
        began: list[float] = []

        def timed() -> Generator[T]:
            began.append(time.monotonic())
            with contextlib.closing(work()) as items:
                yield from items

        job = Job(timed, asyncio.get_running_loop())

        def on_end() -> None:
            self._jobs.discard(job)
            self._publish()
            if began:
                self._typical_seconds += 0.2 * (time.monotonic() - began[0] - self._typical_seconds)

        self._jobs.add(job)
        self._publish()
        job.start(self._executor, on_end)
        return job

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the model thread, past the queue's limit; for starting and closing an engine."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close_jobs(self) -> None:
        """End every job, after its current step."""
        for job in tuple(self._jobs):
            job.close()

    def close(self) -> None:
        """End every job and the model thread; does not wait for the current step."""
        self.close_jobs()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _publish(self) -> None:
        self._metrics.set_queue_depth(max(len(self._jobs) - 1, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the routes share; it hangs on `app.state.services`."""

    settings: Settings
    metrics: Metrics
    runner: Runner
    slot: EngineSlot

    @classmethod
    def of(cls, request: Request) -> Services:
        """Return the services of the application that serves `request`."""
        services = request.app.state.services
        assert isinstance(services, cls)
        return services

    def engine(self) -> ServedEngine:
        """Return the engine. Raises `ApiError` (503) while there is none."""
        if self.slot.engine is None:
            raise not_ready(self.slot.reason)
        return self.slot.engine

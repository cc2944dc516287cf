"""A request ends with its client or with its time, and its work with it; nothing else is mistaken for either."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request

from guard.metrics import Metrics
from service.attending import Deadline, attended
from service.errors import ApiError, ClientGoneError

PATIENCE = 10.0


class Connection:
    """A client that hangs up when it is told to; `seen` counts how often it was asked."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.noise = asyncio.Queue[dict[str, Any]]()
        self.asked = 0
        self.watching = 0
        self.request = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self.receive)

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        if not self.noise.empty():
            return self.noise.get_nowait()
        self.watching += 1
        try:
            await self.gone.wait()
        finally:
            self.watching -= 1
        return {"type": "http.disconnect"}


class Work:
    """Something that takes for ever, and knows how it ended."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.ended = ""

    async def __call__(self) -> None:
        self.began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await scene()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left running"

    asyncio.run(bounded())


def timeouts(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("sailguard_refused_total", {"reason": "timeout"})


def test_client_that_hangs_up_cancels_the_work_and_is_told_apart() -> None:
    async def scene() -> None:
        connection, work = Connection(), Work()

        async def serve() -> None:
            async with attended(connection.request):
                await work()

        task = asyncio.create_task(serve())
        await work.began.wait()
        connection.gone.set()
        with pytest.raises(ClientGoneError):
            await task
        assert work.ended == "cancelled"
        assert not task.cancelled()
        assert connection.watching == 0

    run(scene)


def test_client_that_was_gone_before_gets_no_work_done() -> None:
    async def scene() -> None:
        connection, work = Connection(), Work()
        connection.gone.set()
        with pytest.raises(ClientGoneError):
            async with attended(connection.request):
                await work()
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0, "what follows in this task is not cancelled"
        await asyncio.sleep(0)

    run(scene)


def test_work_that_ends_in_time_is_left_alone_and_nobody_watches_any_more() -> None:
    async def scene() -> None:
        connection = Connection()
        async with attended(connection.request):
            await asyncio.sleep(0)
        assert connection.watching == 0
        connection.gone.set()
        await asyncio.sleep(0)

    run(scene)


def test_other_messages_are_no_end() -> None:
    async def scene() -> None:
        connection = Connection()
        for _ in range(3):
            connection.noise.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        async with attended(connection.request):
            while connection.asked < 4:
                await asyncio.sleep(0)

    run(scene)


def test_ordinary_cancellation_stays_one() -> None:
    async def scene() -> None:
        connection, work = Connection(), Work()

        async def serve() -> None:
            async with attended(connection.request):
                await work()

        task = asyncio.create_task(serve())
        await work.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert work.ended == "cancelled"
        assert connection.watching == 0

    run(scene)


def test_cancellation_prevails_over_a_client_that_hangs_up_at_the_same_time() -> None:
    async def scene() -> None:
        connection, work = Connection(), Work()

        async def serve() -> None:
            async with attended(connection.request):
                await work()

        task = asyncio.create_task(serve())
        await work.began.wait()
        connection.gone.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, ClientGoneError)) as ended:
            await task
        # Had the hang-up been heard first, it would be what ended it; then the cancellation came too late.
        assert isinstance(ended.value, asyncio.CancelledError) is task.cancelled()

    run(scene)


def test_error_of_the_work_is_passed_on_as_it_is() -> None:
    async def scene() -> None:
        connection = Connection()

        async def serve() -> None:
            async with attended(connection.request):
                await asyncio.sleep(0)
                raise ValueError("bird")

        with pytest.raises(ValueError, match="bird"):
            await serve()
        assert connection.watching == 0

    run(scene)


def test_work_beyond_its_time_is_cancelled_and_answered_with_504() -> None:
    async def scene() -> None:
        metrics, work = Metrics(), Work()
        deadline = Deadline(0.02, metrics)
        with pytest.raises(ApiError) as late:
            async with deadline.kept():
                await work()
        assert (late.value.status_code, late.value.code) == (504, "request_timeout")
        assert "0.02 s" in late.value.message
        assert work.ended == "cancelled"
        assert timeouts(metrics) == 1

    run(scene)


def test_deadline_is_one_for_all_steps_of_a_request() -> None:
    async def scene() -> None:
        metrics = Metrics()
        deadline = Deadline(0.02, metrics)
        async with deadline.kept():
            pass
        await asyncio.sleep(0.03)
        with pytest.raises(ApiError):
            async with deadline.kept():
                await asyncio.sleep(3600)
        assert timeouts(metrics) == 1

    run(scene)


def test_time_out_of_the_work_itself_is_no_deadline() -> None:
    async def scene() -> None:
        metrics = Metrics()
        with pytest.raises(TimeoutError, match="upstream"):
            async with Deadline(3600.0, metrics).kept():
                raise TimeoutError("upstream")
        assert timeouts(metrics) == 0

    run(scene)


def test_cancellation_within_a_deadline_stays_one() -> None:
    async def scene() -> None:
        metrics, work = Metrics(), Work()

        async def serve() -> None:
            async with Deadline(3600.0, metrics).kept():
                await work()

        task = asyncio.create_task(serve())
        await work.began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert timeouts(metrics) == 0

    run(scene)


@pytest.mark.parametrize("first", ["client", "deadline"])
def test_both_together_end_the_work_once(first: str) -> None:
    async def scene() -> None:
        metrics, work, connection = Metrics(), Work(), Connection()
        seconds = 3600.0 if first == "client" else 0.02

        async def serve() -> None:
            async with attended(connection.request), Deadline(seconds, metrics).kept():
                await work()

        task = asyncio.create_task(serve())
        await work.began.wait()
        if first == "client":
            connection.gone.set()
        with pytest.raises(ClientGoneError if first == "client" else ApiError):
            await task
        assert work.ended == "cancelled"
        assert timeouts(metrics) == (0 if first == "client" else 1)
        assert connection.watching == 0

    run(scene)

"""Places for answers: never more than there are, first come first served, and none is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.metrics import Metrics
from service.errors import ApiError
from service.slots import Slots

PATIENCE = 10.0


class Scene:
    """Places, and who came in in which order."""

    def __init__(self, max_running: int, max_waiting: int = 100) -> None:
        self.metrics = Metrics()
        self.slots = Slots(max_running=max_running, max_waiting=max_waiting, metrics=self.metrics)
        self.entered: list[int] = []
        self.left: list[int] = []
        self.inside = 0
        self.most = 0
        self.go: dict[int, asyncio.Event] = {}
        self._max_running = max_running

    async def visit(self, number: int) -> None:
        self.go.setdefault(number, asyncio.Event())
        async with self.slots.take():
            self.entered.append(number)
            self.inside += 1
            self.most = max(self.most, self.inside)
            assert self.slots.taken == self.inside <= self._max_running
            try:
                await self.go[number].wait()
            finally:
                self.inside -= 1
                self.left.append(number)

    def begin(self, number: int) -> asyncio.Task[None]:
        return asyncio.create_task(self.visit(number))

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def is_empty(self) -> bool:
        depth = self.value("sailguard_queue_depth")
        return (self.slots.taken, self.slots.waiting, self.inside, depth) == (0, 0, 0, 0)

    async def all_places_are_free(self) -> bool:
        """Whether as many can come in at once as there are places."""
        tasks = [self.begin(1000 + number) for number in range(self._max_running)]
        await settle()
        found = self.inside == self._max_running and self.slots.waiting == 0
        for number in range(self._max_running):
            self.go[1000 + number].set()
        await asyncio.gather(*tasks)
        return found


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0)


def test_no_more_are_inside_than_there_are_places_and_those_who_wait_come_in_by_turn() -> None:
    async def run() -> None:
        scene = Scene(3)
        tasks = [scene.begin(number) for number in range(10)]
        await settle()
        assert (scene.entered, scene.slots.taken, scene.slots.waiting) == ([0, 1, 2], 3, 7)
        assert scene.value("sailguard_queue_depth") == 7
        for number in (1, 0, 2, 5, 3, 4):
            await until(lambda number=number: number in scene.entered)  # type: ignore[misc]  # no default in the type
            scene.go[number].set()
            await settle()
        for event in scene.go.values():
            event.set()
        await asyncio.gather(*tasks)
        assert scene.entered == list(range(10))
        assert scene.most == 3
        assert scene.is_empty()

    asyncio.run(run())


def test_one_too_many_is_refused_and_told_when_to_return() -> None:
    async def run() -> None:
        scene = Scene(1, max_waiting=2)
        tasks = [scene.begin(number) for number in range(3)]
        await settle()
        with pytest.raises(ApiError) as refused:
            await scene.visit(3)
        assert refused.value.status_code == 429
        assert refused.value.headers is not None
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        assert scene.value("sailguard_refused_total", reason="queue") == 1
        assert scene.slots.waiting == 2
        scene.go[0].set()
        await until(lambda: scene.entered == [0, 1])
        late = scene.begin(4)
        await settle()
        assert scene.slots.waiting == 2
        for number in (1, 2, 4):
            scene.go[number].set()
        await asyncio.gather(*tasks, late)
        assert scene.is_empty()

    asyncio.run(run())


def test_nobody_waits_where_nobody_may() -> None:
    async def run() -> None:
        scene = Scene(2, max_waiting=0)
        tasks = [scene.begin(0), scene.begin(1)]
        await settle()
        with pytest.raises(ApiError):
            await scene.visit(2)
        scene.go[0].set()
        await tasks[0]
        tasks.append(scene.begin(3))
        await settle()
        assert scene.entered == [0, 1, 3]
        for number in (1, 3):
            scene.go[number].set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_whoever_comes_when_a_place_is_free_but_promised_goes_behind_those_who_wait() -> None:
    async def run() -> None:
        scene = Scene(1)
        first, second = scene.begin(0), scene.begin(1)
        await settle()
        scene.go[0].set()
        await first
        third = scene.begin(2)  # the place is free, and the second is about to wake up
        await settle()
        assert scene.entered == [0, 1]
        for number in (1, 2):
            scene.go[number].set()
        await asyncio.gather(second, third)
        assert scene.entered == [0, 1, 2]

    asyncio.run(run())


def test_longer_answers_mean_a_longer_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("service.slots.time.monotonic", lambda: now[0])

    async def told(seconds: float) -> int:
        scene = Scene(1, max_waiting=1)
        for number in range(20):
            task = scene.begin(number)
            await settle()
            now[0] += seconds
            scene.go[number].set()
            await task
        tasks = [scene.begin(20), scene.begin(21)]
        await settle()
        with pytest.raises(ApiError) as refused:
            await scene.visit(22)
        for number in (20, 21):
            scene.go[number].set()
        await asyncio.gather(*tasks)
        assert refused.value.headers is not None
        return int(refused.value.headers["Retry-After"])

    assert asyncio.run(told(0.1)) == 1
    assert asyncio.run(told(10.0)) == 20
    assert asyncio.run(told(500.0)) == 60


def test_failure_inside_frees_the_place() -> None:
    async def run() -> None:
        scene = Scene(1)
        for _ in range(3):
            with pytest.raises(ValueError, match="bird"):
                async with scene.slots.take():
                    raise ValueError("bird")
        assert scene.is_empty()
        assert await scene.all_places_are_free()

    asyncio.run(run())


steps = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.just(0)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("leave and cancel"), st.integers(0, 20)),
        st.tuples(st.just("settle"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(steps=steps, max_running=st.integers(1, 3), max_waiting=st.integers(0, 4))
def test_no_place_is_lost_whoever_comes_leaves_or_is_cancelled_when(
    steps: list[tuple[str, int]], max_running: int, max_waiting: int
) -> None:
    async def run() -> None:
        scene = Scene(max_running, max_waiting)
        tasks: list[asyncio.Task[None]] = []
        for kind, chosen in steps:
            if kind == "come":
                tasks.append(scene.begin(len(tasks)))
                await asyncio.sleep(0)
                # One who was woken but has not come in yet still counts as waiting.
                assert scene.slots.waiting <= max_waiting + max_running
            elif tasks:
                number = chosen % len(tasks)
                if "leave" in kind and number in scene.go:
                    scene.go[number].set()
                if "cancel" in kind:
                    # In the very step in which somebody else's place comes free, too.
                    tasks[(number + 1) % len(tasks)].cancel()
            if kind == "settle":
                await settle()
            assert scene.inside <= max_running
        await settle()
        # Those who came in did so in the order in which they had come.
        assert scene.entered == sorted(scene.entered)
        for event in scene.go.values():
            event.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, (asyncio.CancelledError, ApiError)) for one in found)
        assert scene.is_empty()
        assert await scene.all_places_are_free()

    asyncio.run(run())

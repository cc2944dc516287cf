"""The model thread: every request gets its own scores in order, none waits for ever, none spoils another's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.metrics import Metrics
from service.errors import ApiError
from service.runner import Runner, retry_after

PATIENCE = 10.0
steady = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Judge:
    """Its score of a text is the text itself, with its own name and the role; `BAD` fails the pass that it is in."""

    def __init__(self, name: str = "judge") -> None:
        self.name = name
        self.passes: list[list[str]] = []
        self.threads: set[int] = set()
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        self._busy = threading.Lock()

    def score(self, texts: Sequence[str], roles: Sequence[str]) -> list[Any]:
        assert self._busy.acquire(blocking=False), "two passes at once"
        try:
            self.threads.add(threading.get_ident())
            self.passes.append(list(texts))
            self.entered.release()
            assert self.go.wait(PATIENCE), "the test never let the engine go on"
            if any("BAD" in text for text in texts):
                raise ValueError("a bad text")
            return [f"{self.name}:{role}:{text}" for text, role in zip(texts, roles, strict=True)]
        finally:
            self._busy.release()


class Scene:
    """A runner with its metrics."""

    def __init__(self, max_queue: int = 1000) -> None:
        self.metrics = Metrics()
        self.runner = Runner(max_queue=max_queue, metrics=self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    @property
    def depth(self) -> float | None:
        return self.value("sailguard_queue_depth")

    async def judge(self, judge: Judge, texts: Sequence[str], role: Any = "prompt") -> list[Any]:
        async with asyncio.timeout(PATIENCE):
            return await self.runner.judge(judge, texts, [role] * len(texts))  # type: ignore[arg-type]  # a small one

    def begin(self, judge: Judge, texts: Sequence[str]) -> asyncio.Task[list[Any]]:
        return asyncio.create_task(self.judge(judge, texts))


@contextlib.contextmanager
def scene(max_queue: int = 1000) -> Iterator[Scene]:
    made = Scene(max_queue)
    try:
        yield made
    finally:
        made.runner.close()


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.001)


def scores_of(judge: Judge, texts: Sequence[str], role: str = "prompt") -> list[str]:
    return [f"{judge.name}:{role}:{text}" for text in texts]


@steady
@given(
    requests=st.lists(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=40), max_size=8),
    bad=st.sets(st.integers(0, 7), max_size=3),
    engines=st.lists(st.integers(0, 1), min_size=8, max_size=8),
)
def test_each_request_gets_its_own_scores_in_order_and_fails_by_its_own_text_alone(
    requests: list[list[tuple[int, bool]]], bad: set[int], engines: list[int]
) -> None:
    judges = (Judge("first"), Judge("second"))
    asked = [
        [
            f"{'BAD' if number in bad and here else ''}{number}.{place} " + "x" * length
            for place, (length, here) in enumerate(texts)
        ]
        for number, texts in enumerate(requests)
    ]

    async def ask(scene: Scene) -> list[Any]:
        tasks = [scene.begin(judges[engines[number]], texts) for number, texts in enumerate(asked)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    with scene() as made:
        found = asyncio.run(ask(made))
        assert made.runner.waiting == 0
        assert made.depth == 0
    for number, (texts, scores) in enumerate(zip(asked, found, strict=True)):
        if any("BAD" in text for text in texts):
            assert isinstance(scores, ValueError)
        else:
            assert scores == scores_of(judges[engines[number]], texts)
    mine = [
        {text for number, texts in enumerate(asked) if engines[number] == which for text in texts} for which in (0, 1)
    ]
    for which, judge in enumerate(judges):
        for texts in judge.passes:
            assert set(texts) <= mine[which], "a pass is of one engine's texts"
            assert len(texts) <= 32
            assert len(texts) == 1 or sum(map(len, texts)) <= 16384
        assert len(judge.threads) <= 1
    if not bad:
        assert (
            max(Counter(text for judge in judges for texts in judge.passes for text in texts).values(), default=0) <= 1
        )


def test_waiting_requests_are_judged_in_one_pass() -> None:
    judge = Judge()
    judge.go.clear()

    async def ask(scene: Scene) -> None:
        first = scene.begin(judge, ["a"])
        await until(lambda: judge.entered.acquire(blocking=False))
        others = [scene.begin(judge, [f"b{number}", f"c{number}"]) for number in range(5)]
        await until(lambda: scene.runner.waiting == 6)
        assert scene.depth == 6
        judge.go.set()
        assert await first == scores_of(judge, ["a"])
        for number, task in enumerate(others):
            assert await task == scores_of(judge, [f"b{number}", f"c{number}"])

    with scene() as made:
        asyncio.run(ask(made))
        assert [len(texts) for texts in judge.passes] == [1, 10]
        assert made.value("sailguard_batch_texts_count") == 2
        assert made.value("sailguard_batch_texts_sum") == 11


def test_roles_stay_with_their_texts() -> None:
    judge = Judge()

    async def ask(scene: Scene) -> list[Any]:
        roles = ("prompt", "response", "passage")
        return await asyncio.gather(*(scene.judge(judge, ["a", "b"], role) for role in roles))

    with scene() as made:
        found = asyncio.run(ask(made))
    assert found == [scores_of(judge, ["a", "b"], role) for role in ("prompt", "response", "passage")]


def test_small_request_does_not_wait_for_one_of_hundreds_of_texts() -> None:
    judge = Judge()
    judge.go.clear()
    many = [f"text {number}" for number in range(256)]

    async def ask(scene: Scene) -> None:
        large = scene.begin(judge, many)
        await until(lambda: judge.entered.acquire(blocking=False))
        small = [scene.begin(judge, [f"small {number}"]) for number in range(3)]
        await until(lambda: scene.runner.waiting == 4)
        judge.go.set()
        assert [await task for task in small] == [scores_of(judge, [f"small {number}"]) for number in range(3)]
        passed = len(judge.passes)
        assert not large.done()
        assert passed <= 3, "the small ones are in the pass after the one that ran"
        assert await large == scores_of(judge, many)

    with scene() as made:
        asyncio.run(ask(made))
        assert sum(map(len, judge.passes)) == 259
        assert {f"small {number}" for number in range(3)} <= set(judge.passes[1])


def test_several_large_requests_go_on_side_by_side() -> None:
    judge = Judge()
    judge.go.clear()

    async def ask(scene: Scene) -> None:
        tasks = [scene.begin(judge, [f"{name}{number}" for number in range(100)]) for name in "abcdefgh"]
        await until(lambda: scene.runner.waiting == 8)
        judge.go.set()
        await asyncio.gather(*tasks)

    with scene() as made:
        asyncio.run(ask(made))
    seen: Counter[str] = Counter()
    for texts in judge.passes[1:-8]:
        seen.update(text[0] for text in texts)
        assert max(seen.values()) - min(seen[name] for name in "bcdefgh") <= 40


def test_long_texts_are_judged_in_passes_of_their_own_and_hold_up_nobody_for_more_than_one() -> None:
    judge = Judge()
    long, short = ["x" * 50_000 for _ in range(4)], [f"short {number}" for number in range(8)]

    async def ask(scene: Scene) -> None:
        found = await asyncio.gather(scene.judge(judge, long), scene.judge(judge, short))
        assert found == [scores_of(judge, long), scores_of(judge, short)]

    with scene() as made:
        asyncio.run(ask(made))
    first = next(number for number, texts in enumerate(judge.passes) if "short 0" in texts)
    assert first <= 1
    assert all(len(texts) == 1 for texts in judge.passes if long[0] in texts)


@steady
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    cancelled=st.sets(st.integers(0, 5), min_size=1),
    early=st.booleans(),
)
def test_cancelled_request_leaves_the_queue_and_the_others_are_not_disturbed(
    sizes: list[int], cancelled: set[int], early: bool
) -> None:
    judge = Judge()
    judge.go.clear()
    asked = [[f"{number}.{place}" for place in range(size)] for number, size in enumerate(sizes)]

    async def ask(scene: Scene) -> None:
        tasks = [scene.begin(judge, texts) for texts in asked]
        await until(lambda: judge.entered.acquire(blocking=False))
        await until(lambda: scene.runner.waiting == len(tasks))
        for number in cancelled & set(range(len(tasks))):
            tasks[number].cancel()
        if early:
            await asyncio.sleep(0)
        judge.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for number, scores in enumerate(found):
            if number in cancelled:
                assert isinstance(scores, asyncio.CancelledError)
            else:
                assert scores == scores_of(judge, asked[number])

    with scene() as made:
        asyncio.run(ask(made))
        assert made.runner.waiting == 0
        assert made.depth == 0
        waiting = set(judge.passes[0])
        for number in cancelled & set(range(len(sizes))):
            assert {text for texts in judge.passes[1:] for text in texts}.isdisjoint(set(asked[number]) - waiting)


def test_requests_that_are_gone_are_not_judged_again_when_a_pass_fails() -> None:
    judge = Judge()
    judge.go.clear()

    async def ask(scene: Scene) -> None:
        first = scene.begin(judge, ["a"])
        await until(lambda: judge.entered.acquire(blocking=False))
        gone, bad = scene.begin(judge, ["gone"]), scene.begin(judge, ["BAD"])
        await until(lambda: scene.runner.waiting == 3)
        judge.go.set()
        await first
        judge.go.clear()
        await until(lambda: judge.entered.acquire(blocking=False))
        gone.cancel()
        await asyncio.sleep(0)
        judge.go.set()
        with pytest.raises(ValueError, match="bad"):
            await bad
        await asyncio.gather(gone, return_exceptions=True)

    with scene() as made:
        asyncio.run(ask(made))
        assert sum(texts.count("gone") for texts in judge.passes) <= 1


def test_full_queue_refuses_at_once_says_when_to_return_and_takes_new_ones_afterwards() -> None:
    judge = Judge()
    judge.go.clear()

    async def ask(scene: Scene) -> None:
        running = scene.begin(judge, ["running"])
        await until(lambda: judge.entered.acquire(blocking=False))
        waiting = [scene.begin(judge, [f"{number}"]) for number in range(3)]
        await until(lambda: scene.runner.waiting == 4)
        with pytest.raises(ApiError) as refused:
            await scene.judge(judge, ["too many"])
        assert refused.value.status_code == 429
        assert refused.value.headers is not None
        assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
        assert scene.value("sailguard_refused_total", reason="queue") == 1
        assert scene.depth == 4
        waiting[0].cancel()
        await until(lambda: scene.runner.waiting == 3)
        late = scene.begin(judge, ["late"])
        await until(lambda: scene.runner.waiting == 4)
        judge.go.set()
        await asyncio.gather(running, *waiting[1:], late)

    with scene(max_queue=3) as made:
        asyncio.run(ask(made))
        assert made.depth == 0


def test_queue_of_none_judges_one_request_at_a_time() -> None:
    judge = Judge()

    async def ask(scene: Scene) -> None:
        for number in range(5):
            assert await scene.judge(judge, [f"{number}"]) == scores_of(judge, [f"{number}"])

    with scene(max_queue=0) as made:
        asyncio.run(ask(made))


def test_no_texts_need_no_pass() -> None:
    judge = Judge()
    with scene() as made:
        assert asyncio.run(made.judge(judge, [])) == []
    assert judge.passes == []


@pytest.mark.parametrize("given_back", [0, 1, 3])
def test_engine_that_returns_too_few_or_too_many_scores_fails_the_request(given_back: int) -> None:
    class Wrong(Judge):
        def score(self, texts: Sequence[str], roles: Sequence[str]) -> list[Any]:
            return ["score"] * given_back

    with scene() as made:
        with pytest.raises(RuntimeError, match="2 texts"):
            asyncio.run(made.judge(Wrong(), ["a", "b"]))
        assert made.depth == 0


def test_calls_and_passes_share_the_one_thread_in_order() -> None:
    judge = Judge()
    judge.go.clear()
    order: list[str] = []

    async def ask(scene: Scene) -> None:
        judging = scene.begin(judge, ["a"])
        await until(lambda: judge.entered.acquire(blocking=False))
        calls = [asyncio.create_task(scene.runner.call(lambda name=name: order.append(name))) for name in "xyz"]
        await asyncio.sleep(0)
        assert order == []
        judge.go.set()
        await asyncio.gather(judging, *calls)

    with scene() as made:
        asyncio.run(ask(made))
    assert order == ["x", "y", "z"]


def test_closing_ends_what_waits_and_takes_nothing_more() -> None:
    judge = Judge()
    judge.go.clear()

    async def ask(scene: Scene) -> None:
        tasks = [scene.begin(judge, ["running"])]
        await until(lambda: judge.entered.acquire(blocking=False))
        tasks.append(scene.begin(judge, ["waiting"]))
        await until(lambda: scene.runner.waiting == 2)
        scene.runner.close()
        judge.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, (asyncio.CancelledError, list)) for one in found)
        with pytest.raises(ApiError) as refused:
            await scene.judge(judge, ["late"])
        assert refused.value.status_code == 503

    with scene() as made:
        asyncio.run(ask(made))
        assert made.depth == 0
        assert judge.passes == [["running"]]


@pytest.mark.parametrize(("seconds", "told"), [(-1.0, 1), (0.0, 1), (0.2, 1), (1.01, 2), (59.5, 60), (1e9, 60)])
def test_retry_after_is_between_a_second_and_a_minute(seconds: float, told: int) -> None:
    assert retry_after(seconds) == told

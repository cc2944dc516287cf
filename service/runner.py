"""The model thread: everything that blocks runs there, one call at a time, and texts to judge are put together there.

Requests that want texts judged wait in a bounded queue. Whenever the thread is free it takes a batch: a few texts of
each waiting request in turn, so that one with hundreds of texts does not keep the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from service.errors import not_ready, overloaded

if TYPE_CHECKING:
    from feature_bank.layout import Role
    from guard.events import TextScore
    from guard.metrics import Metrics
    from service.engine import ServedEngine

__all__ = ["Runner", "retry_after"]

T = TypeVar("T")

_TURN = 8  # texts that one request has in a batch while others wait
_BATCH = 32  # texts of one batch
_BATCH_CHARACTERS = 16384  # of one batch, if it holds more than one text


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    """A request's texts, and what is known of them so far."""

    engine: ServedEngine
    texts: Sequence[str]
    roles: Sequence[Role]
    done: asyncio.Future[None]
    keep: bool | None
    scores: list[TextScore] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        return self.done.done()


class Runner:
    """The model thread and the texts that wait for it. The methods belong to the event loop's thread.

    max_queue: requests whose texts may wait; one more is refused.
    """

    def __init__(self, *, max_queue: int, metrics: Metrics) -> None:
        self._max_queue = max_queue
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sailguard-model")
        self._waiting: deque[_Waiting] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._typical_seconds = 0.1
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests whose texts wait or are being judged."""
        return len(self._waiting)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the model thread, after what it is doing."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def judge(
        self, engine: ServedEngine, texts: Sequence[str], roles: Sequence[Role], *, keep: bool | None = None
    ) -> list[TextScore]:
        """Judge `texts`, each in its role, together with those of other requests. A cancelled call leaves the queue.

        keep: whether the scores hold what was seen: of all texts, or of those with a verdict; None for neither.

        Raises `ApiError` (429, with Retry-After) if the queue is full, or (503) after `close`, and whatever the engine
        raises.
        """
        if not texts:
            return []
        if self._closed:
            raise not_ready("The server is shutting down.")
        if len(self._waiting) > self._max_queue:
            self._metrics.count_refusal("queue")
            raise overloaded(retry_after(self._typical_seconds * len(self._waiting)))
        loop = asyncio.get_running_loop()
        mine = _Waiting(engine=engine, texts=texts, roles=roles, done=loop.create_future(), keep=keep)
        self._waiting.append(mine)
        self._metrics.queued(1)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._judge_all())
        try:
            await mine.done
        finally:
            self._metrics.queued(-1)
            with contextlib.suppress(ValueError):
                self._waiting.remove(mine)
        return mine.scores

    def close(self) -> None:
        """End the model thread after its current step; what waits is cancelled."""
        self._closed = True
        for request in tuple(self._waiting):
            request.done.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _judge_all(self) -> None:
        while self._waiting and not self._closed:
            batch = self._next_batch()
            if not batch:
                continue
            began = time.monotonic()
            await self._judge_batch(batch)
            self._typical_seconds += 0.2 * (time.monotonic() - began - self._typical_seconds)

    def _next_batch(self) -> list[tuple[_Waiting, int]]:
        """(request, how many of its next texts) of the next batch, all for the engine of the request in front."""
        for request in [request for request in self._waiting if request.gone]:
            self._waiting.remove(request)
        if not self._waiting:
            return []
        engine, texts, characters = self._waiting[0].engine, 0, 0
        batch: list[tuple[_Waiting, int]] = []
        share = _BATCH if len(self._waiting) == 1 else _TURN
        for request in self._waiting:
            if request.engine is not engine:
                continue
            first, taken = len(request.scores), 0
            for text in request.texts[first : first + share]:
                characters += len(text)
                if texts and (texts == _BATCH or characters > _BATCH_CHARACTERS):
                    break
                texts, taken = texts + 1, taken + 1
            if taken:
                batch.append((request, taken))
        for request, _ in batch:  # whoever had a turn stands behind those that had none
            self._waiting.remove(request)
            self._waiting.append(request)
        return batch

    async def _judge_batch(self, batch: Sequence[tuple[_Waiting, int]]) -> None:
        engine = batch[0][0].engine
        texts: list[str] = []
        roles: list[Role] = []
        keep: list[bool] = []
        for request, count in batch:
            part = slice(len(request.scores), len(request.scores) + count)
            texts += request.texts[part]
            roles += request.roles[part]
            keep += [bool(request.keep)] * count
        # An engine that keeps nothing need not know of it.
        kept: dict[str, Any] = {} if all(request.keep is None for request, _ in batch) else {"keep": keep}
        try:
            scores = list(await self.call(lambda: engine.score(texts, roles, **kept)))
            if len(scores) != len(texts):
                raise RuntimeError(f"{len(texts)} texts were to be judged, {len(scores)} were")
        except Exception as error:  # noqa: BLE001 - it is raised in the request that it belongs to
            if len(batch) > 1:  # one request's text is not to fail the others'
                for one in batch:
                    if not one[0].gone:
                        await self._judge_batch([one])
            elif not batch[0][0].gone:
                batch[0][0].done.set_exception(error)
            return
        self._metrics.observe_batch(len(texts))
        for request, count in batch:
            request.scores += scores[:count]
            scores = scores[count:]
            if len(request.scores) == len(request.texts) and not request.gone:
                request.done.set_result(None)


def retry_after(seconds: float) -> int:
    """Whole seconds for a Retry-After header: at least one, at most a minute."""
    return min(max(math.ceil(seconds), 1), 60)

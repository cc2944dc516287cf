"""Explanations by a language model on a cluster: features spread over workers, one endpoint for all of them.

The workers write the questions and read the answers. They send nothing: each question goes through a desk to the
command's own process, which holds the endpoint, its caps and the API key, and keeps every answer. So the caps hold for
the whole cluster to the call, and a worker that is lost takes no call and no answer with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from feature_bank.errors import DataError
from feature_bank.ray_cluster import import_ray
from training.cluster.room import Room, room
from training.cluster.spreading import spread_over
from training.explain.endpoint import ChatEndpoint
from training.explain.interface import FeatureEvidence
from training.explain.replies import ChatReply, ChatRequest
from training.explain.sharing import SharedEndpoint
from training.explain.spending import EndpointError
from training.simulation.llm import SegmentText
from training.simulation.llm_run import LlmRun, Report, answered_rows, summarise
from training.simulation.prompts import Level
from training.spreading import FLOATS, Work, work_off

LISTEN_SECONDS = 0.5


class Desk:
    """Where workers lay their questions, and the command its replies. Runs beside the command, as an actor."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Sequence[ChatRequest], asyncio.Future[list[ChatReply]]]] = {}
        self._new: asyncio.Queue[int] = asyncio.Queue()
        self._asked = 0

    async def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """The replies, when they are there. Called by a worker."""
        self._asked += 1
        number = self._asked
        replies: asyncio.Future[list[ChatReply]] = asyncio.get_running_loop().create_future()
        self._open[number] = (requests, replies)
        self._new.put_nowait(number)
        try:
            return await replies
        finally:
            del self._open[number]

    async def take(self, seconds: float) -> list[tuple[int, Sequence[ChatRequest]]]:
        """What is new, waited for as long at most. Called by the command."""
        found: list[int] = []
        with contextlib.suppress(TimeoutError):
            found.append(await asyncio.wait_for(self._new.get(), seconds))
        while not self._new.empty():
            found.append(self._new.get_nowait())
        return [(number, self._open[number][0]) for number in found if number in self._open]

    async def answer(self, number: int, replies: list[ChatReply]) -> None:
        """Give a worker its replies, if it still waits. Called by the command."""
        if number in self._open and not self._open[number][1].done():
            self._open[number][1].set_result(replies)


@dataclass(frozen=True)
class DeskEndpoint:
    """The endpoint as a worker sees it."""

    model: str
    desk: Any

    def ask_all(self, requests: Sequence[ChatRequest], *, report: Any = None) -> list[ChatReply]:  # noqa: ARG002
        """The replies, in the order of the requests; those that nobody may ask any more are `not_asked`."""
        import ray

        if not requests:
            return []
        replies: list[ChatReply] = ray.get(self.desk.ask.remote(list(requests)))
        return replies


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Some of the features."""

    evidence: tuple[FeatureEvidence, ...]
    segments: Mapping[str, Sequence[SegmentText]]


@dataclass(frozen=True, kw_only=True)
class Asking(Work[Asked, list[dict[str, Any]]]):
    """What is asked about every feature, and where."""

    results = TypeAdapter(list[dict[str, Any]], config=FLOATS)
    endpoint: DeskEndpoint
    levels: tuple[Level, ...]

    def do(self, part: Asked) -> list[dict[str, Any]]:
        """The rows of those that were asked about."""
        return answered_rows(part.evidence, part.segments, endpoint=self.endpoint, levels=self.levels)


def run_on_cluster(
    evidence: Sequence[FeatureEvidence],
    segments: Mapping[str, Sequence[SegmentText]],
    *,
    endpoint: ChatEndpoint,
    levels: Sequence[Level] = (),
    report: Report | None = None,
) -> LlmRun:
    """`training.simulation.llm_run.run` on the connected cluster: the same arguments, and the same rows.

    Features are gone through a few at a time, with all that is asked about each; when a cap ends the run, other
    features may be finished than on one machine.

    Raises DataError for another version on a worker, or a cluster that is lost.
    """
    places = room("cpu", 1)
    together = _together(len(evidence), places, endpoint.workers)
    features = 0

    def part(number: int) -> Asked:
        chosen = tuple(evidence[number * together : (number + 1) * together])
        return Asked(evidence=chosen, segments={f.id: segments[f.id] for f in chosen if f.id in segments})

    def say(number: int) -> None:
        nonlocal features
        features += len(evidence[number * together : (number + 1) * together])
        if report is not None:
            report("explain", features, len(evidence), f"{features:,} features, {endpoint.usage.calls:,} calls")

    with SharedEndpoint(endpoint) as shared, _desk(shared) as desk:
        work = Asking(endpoint=DeskEndpoint(endpoint.model, desk), levels=tuple(levels))
        found = work_off(
            work,
            -(-len(evidence) // together),
            part,
            spread=lambda work, parts: spread_over(places, work, parts),
            on_part=say,
        )
    failure = shared.failure
    if failure is not None and not isinstance(failure, EndpointError):
        raise failure
    rows = [row for part_rows in found for row in part_rows]
    return LlmRun(rows=rows, summary=summarise(rows, len(evidence), levels, endpoint.usage), stopped=failure)


def _together(features: int, places: Room, calls: int) -> int:
    """Features of a part: so few that all workers have some, and no more than keep the endpoint busy."""
    return max(1, min(calls, -(-features // places.workers)))


@contextlib.contextmanager
def _desk(shared: SharedEndpoint) -> Iterator[Any]:
    """A desk whose questions are put to the endpoint, for the time of the context."""
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk: Any = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here, max_concurrency=10_000).remote()
    ended = threading.Event()
    lost: list[Exception] = []

    def pass_on(number: int, replies: Future[list[ChatReply]]) -> None:
        if not replies.cancelled():
            with contextlib.suppress(Exception):  # the connection may be closed by now
                desk.answer.remote(number, replies.result())

    def serve() -> None:
        try:
            while not ended.is_set():
                for number, requests in ray.get(desk.take.remote(LISTEN_SECONDS)):
                    replies = shared.submit(requests)
                    replies.add_done_callback(partial(pass_on, number))
        except Exception as e:  # noqa: BLE001  # it is raised again in the thread that waits
            lost.append(e)

    thread = threading.Thread(target=serve, name="sailguard-desk", daemon=True)
    thread.start()
    try:
        yield desk
    finally:
        ended.set()
        thread.join()
        ray.kill(desk)
    if lost:
        raise DataError(f"the cluster could not go on ({lost[0]}); answers are kept: run the same command again")

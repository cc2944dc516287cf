"""Parts of one piece of work, each done by one of many Ray actors that hold what the parts share.

The work is put into the cluster's object store once, and so is each part; an actor takes the parts that it is given
from there and hands back their results, which are small.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from feature_bank.errors import SailguardError
from feature_bank.ray_cluster import import_ray
from training.cluster.pool import work_off_tables
from training.cluster.room import Room, check_version, own_version, room
from training.spreading import Work

P = TypeVar("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)


class PartActor:
    """Holds the work, and does one part a call. Runs on a worker."""

    def __init__(self, work: Any, parts: list[Any], device: str, threads: int, expected_version: str) -> None:
        import ray
        import torch

        torch.set_num_threads(threads)
        self._version = expected_version
        self._parts = parts
        self._work: Work[Any, Any] = ray.get(work[0]).on(device)

    def __call__(self, item: Any) -> Any:
        """item: a table of one row, the part's number. Gives it, the result as JSON, and what went wrong."""
        import pyarrow
        import ray

        number = item["number"][0].as_py()
        result, error = b"", ""
        try:
            check_version(self._version)
            part = ray.get(self._parts[number])
            result = self._work.results.dump_json(self._work.do_alike(part))
        except SailguardError as e:
            error = str(e)
        return pyarrow.table({"number": [number], "result": [result], "error": [error]})


def spread_on_cluster(work: Work[P, R], parts: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
    """`training.spreading.here` on the connected cluster: the same results.

    Raises DataError for what the work raises it for, for another version on a worker, or a cluster that is lost.
    """
    places = room(work.device, work.threads)
    if work.device == "cpu" and places.cpus != work.threads:
        logger.warning(
            "a worker computes with %d threads, this process with %d: the last digit of an effect may differ",
            places.cpus,
            work.threads,
        )
    return spread_over(places, work, parts)


def spread_over(places: Room, work: Work[P, R], parts: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
    """`spread_on_cluster` over so many workers, at most."""
    import pyarrow

    ray = import_ray()
    numbers: list[int] = []
    held: list[Any] = []
    for number, part in parts:
        numbers.append(number)
        held.append(ray.put(part))
    if not numbers:
        return
    shared = ray.put(work.on("cpu"))
    found = work_off_tables(
        PartActor,
        ([shared], held, work.device, places.cpus, own_version()),
        [pyarrow.table({"number": [place]}) for place in range(len(numbers))],
        places,
        workers=min(places.workers, len(numbers)),
        kept="what is finished is kept",
    )
    for row in found:
        yield numbers[row["number"]], work.results.validate_json(row["result"])

"""The connection to a Ray cluster, and how many workers it has room for."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from feature_bank.errors import DataError

INSTALL = "pip install 'sailguard[ray]'"
CONNECT_SECONDS = 10.0
LOCAL = "local"
_LOUD = ("ray.data", "ray.train")


class Room(NamedTuple):
    """Workers that a cluster can hold at a time, all alike."""

    workers: int
    cpus: int
    """Of a worker, which computes with as many threads."""
    gpus: int
    """Of a worker: 1 if it computes on an accelerator."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Be connected to a Ray cluster for the time of the context.

    address: "auto" for the cluster that this machine belongs to (or that RAY_ADDRESS names), HOST:PORT of another one's
    head; None or "local" starts one on this machine alone, which ends with the context. When the context ends, however
    it ends, everything that it had started on the cluster is stopped. A process that is connected already stays so.

    Raises DataError if the extra is not installed, or the cluster cannot be reached or is of another version.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    started = address in (None, LOCAL)
    options: dict[str, Any] = {"address": LOCAL if started else address}
    if started:
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    else:
        _check_reachable(str(address))
    try:
        with _quiet():
            try:
                ray.init(**options, log_to_driver=False, logging_level=logging.WARNING)
            except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as e:
                reason = " ".join(str(e).split())[:300]
                raise DataError(
                    f"--cluster {address or LOCAL}: no Ray cluster could be joined ({reason}); start one with "
                    "`ray start --head`, see that sailguard, ray and Python are the same versions there, or say "
                    "HOST:PORT of its head"
                ) from e
            yield
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """The module. Raises DataError naming the extra if it is not installed."""
    try:
        import ray
        import ray.data
        import ray.train
    except ImportError as e:
        raise DataError(f"a cluster needs Ray ({e}); run: {INSTALL}") from e
    return ray


def room(device_type: str, threads: int) -> Room:
    """The workers that the connected cluster has room for.

    device_type: where they compute, "cuda" for one accelerator each. threads: what a worker should compute with; the
    smallest machine with a CPU may have fewer. Results on CPUs are equal to the bit where these are as many as here.

    Raises DataError if no machine of the cluster can hold a worker.
    """
    ray = import_ray()
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device_type == "cuda":
        gpus = sum(int(found.get("GPU", 0)) for found in resources)
        if not gpus:
            raise DataError("this process computes on an accelerator, but no machine of the cluster offers one to Ray")
        return Room(gpus, 1, 1)
    cpus = [int(found.get("CPU", 0)) for found in resources if found.get("CPU", 0) >= 1]
    if not cpus:
        raise DataError("no machine of the cluster offers a CPU to Ray; start one with `ray start --num-cpus N`")
    each = max(1, min(threads, *cpus))
    return Room(sum(n // each for n in cpus), each, 0)


def own_version() -> str:
    """The version of sailguard in this process; workers must have the same."""
    try:
        return version("sailguard")
    except PackageNotFoundError:  # run from its sources
        return "0"


def _check_reachable(address: str) -> None:
    """Refuse in seconds what Ray would try to reach for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise DataError(f"--cluster {address!r}: say auto, or HOST:PORT of the head (6379 unless told otherwise)")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise DataError(
            f"--cluster {address}: nothing answers there ({e}); see that `ray start --head` runs and the port is open"
        ) from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave progress to the caller: of Ray's libraries only errors are said."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

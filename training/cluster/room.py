"""How many workers the connected Ray cluster has room for, and what they must be like."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from feature_bank.errors import DataError
from feature_bank.ray_cluster import import_ray

__all__ = ["Room", "check_version", "own_version", "room"]


class Room(NamedTuple):
    """Workers that a cluster can hold at a time, all alike."""

    workers: int
    cpus: int
    """Of a worker, which computes with as many threads."""
    gpus: int
    """Of a worker: 1 if it computes on an accelerator."""


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


def check_version(expected: str) -> None:
    """Raise DataError if this process has another version of sailguard than the one that gave it work."""
    if (found := own_version()) != expected:
        raise DataError(f"machine {os.uname().nodename} has sailguard {found}, not {expected}; install one version")

"""The connection to a Ray cluster, for what works or serves on one. Ray is not needed before one is asked for."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from feature_bank.errors import DataError

__all__ = ["CONNECT_SECONDS", "INSTALL", "LOCAL", "connect", "import_ray"]

INSTALL = "pip install 'sailguard[ray]'"
CONNECT_SECONDS = 10.0
LOCAL = "local"
AUTO = "auto"
_LOUD = ("ray.data", "ray.train", "ray.serve")


@contextmanager
def connect(address: str | None, *libraries: str) -> Iterator[None]:
    """Be connected to a Ray cluster for the time of the context.

    address: "auto" for the cluster that this machine belongs to (or that RAY_ADDRESS names), HOST:PORT of another one's
    head; None or "local" starts one on this machine alone, which ends with the context. When the context ends, however
    it ends, everything that it had started on the cluster is stopped, but for what was detached from it. A process that
    is connected already stays so.

    libraries: of Ray's, those that will be needed, such as "serve": one that is missing is said at once.

    Raises DataError if the extra is not installed, or the cluster cannot be reached or is of another version.
    """
    ray = import_ray(*libraries)
    if ray.is_initialized():
        yield
        return
    started = address in (None, LOCAL)
    options: dict[str, Any] = {"address": LOCAL if started else address}
    if started:
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    elif address == AUTO:
        _check_reachable(os.environ.get("RAY_ADDRESS") or AUTO, "RAY_ADDRESS")
    else:
        _check_reachable(str(address), "--cluster")
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


def import_ray(*libraries: str) -> Any:
    """The module, with those of its libraries. Raises DataError naming the extra if one is not installed."""
    try:
        for library in ("ray", *(f"ray.{name}" for name in libraries)):
            importlib.import_module(library)
    except ImportError as e:
        raise DataError(f"a cluster needs Ray ({e}); run: {INSTALL}") from e
    return importlib.import_module("ray")


def _check_reachable(address: str, named: str) -> None:
    """Refuse in seconds what Ray would try to reach for minutes. named: what said the address."""
    if address == AUTO:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        raise DataError(f"{named} {address!r}: say auto, or HOST:PORT of the head (6379 unless told otherwise)")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise DataError(
            f"{named} {address}: nothing answers there ({e}); see that `ray start --head` runs and the port is open"
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

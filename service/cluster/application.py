"""The application that Ray Serve runs: replicas of the sidecar, and who says whose turn it is to load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service.errors import SettingsError

if TYPE_CHECKING:
    from service.settings import Settings

__all__ = ["DEPLOYMENT", "build", "make_application"]

DEPLOYMENT = "Sailguard"
_STREAMS = 128  # beside what waits and what is answered: event streams, reads of features, metrics
_TARGET = 8.0


def build(args: Mapping[str, Any]) -> Any:
    """The application of Ray Serve's own commands and config files: `serve run service.cluster:build model=FOLDER`.

    args: settings by their names (`model`, `bank`, `policy`, ...; what is left out is taken from SAILGUARD_* where this
    runs, which is not on each machine), and `replicas` and `max_replicas`.

    Raises SettingsError for what cannot be used.
    """
    from service.settings import Settings

    given = dict(args)
    counts = {name: _count(name, given.pop(name)) for name in ("replicas", "max_replicas") if name in given}
    return make_application(Settings(**given), **counts)


def make_application(settings: Settings, *, replicas: int = 1, max_replicas: int | None = None) -> Any:
    """The application under `settings`.

    replicas: how many there are, or with `max_replicas` the fewest; between the two Serve adds and removes some by the
    requests that are under way. A replica has as many CPUs as the setting `threads` says, and one if it says nothing.

    Raises SettingsError for settings that do not fit replicas, DataError if Ray is not installed.
    """
    from feature_bank.ray_cluster import import_ray
    from service.app import DRAIN_SECONDS, version
    from service.cluster.replica import Replica
    from service.cluster.turns import Turns
    from service.sidecar import check_sidecar
    from service.worker import plain_values

    serve: Any = import_ray("serve").serve
    if replicas < 1 or (max_replicas is not None and max_replicas < replicas):
        raise SettingsError(f"replicas {replicas}, max_replicas {max_replicas}: at least 1, and the most not below it")
    check_sidecar(settings)
    for name, value in (("workers", settings.workers), ("watch_seconds", not settings.watch_seconds)):
        if value:
            raise SettingsError(f"setting {name!r}: {_UNFIT[name]}")
    threads = settings.threads or 1
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        bounds = {"min_replicas": replicas, "initial_replicas": replicas, "max_replicas": max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": _TARGET}}
    quiet = {"enable_access_log": False}  # it would hold paths, and what is asked in them
    turns = serve.deployment(Turns, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, logging_config=quiet)
    replica = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": threads},
        # The application itself refuses what is too much, with 429, before Serve would let it wait
        max_ongoing_requests=settings.max_queue + settings.max_concurrent + _STREAMS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        max_constructor_retry_count=3,  # what cannot be used cannot be used at the twentieth attempt either
        logging_config=quiet,
        **scaling,
    )
    return replica.bind({**_absolute(plain_values(settings)), "threads": threads}, version(), turns.bind())


_UNFIT = {
    "workers": "a replica is one process; say how many with --replicas",
    "watch_seconds": "replicas follow the bank's and the policy's files; give it some seconds, such as 2",
}


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with whole paths: replicas run in another folder. A link stays one, for it is to be followed."""
    for name in ("model", "bank", "policy", "shadow", "api_keys_file", "audit", "spool"):
        if values[name] is not None and (name in ("audit", "spool") or os.path.lexists(values[name])):
            values[name] = os.path.abspath(values[name])
    return values


def _count(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name}={value!r} is no number") from None

"""A Ray cluster of two nodes on the loopback, each with one CPU, whose nodes a test may take away."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from feature_bank.ray_cluster import connect

OBJECT_STORE = 80 << 20
FREE_SECONDS = 60.0
# A node that is gone is noticed in seconds, not in half a minute
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # Room on a node that is gone is waited for this long, before fewer workers are started
    # (long enough for a worker to start on a busy machine)
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class TwoNodes:
    """The head, and one node more."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.address: str = cluster.address
        self.second: Any = None

    def add_second(self) -> None:
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)
            self.cluster.wait_for_nodes()

    def kill_second(self) -> None:
        node, self.second = self.second, None
        if node is not None:
            self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def started_nodes() -> Iterator[TwoNodes]:
    """The cluster, with its head alone; the test is skipped where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed; pip install 'sailguard[ray]', or scripts/test --all")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
                "_system_config": HEALTH,
            },
        )
        try:
            yield TwoNodes(cluster)
        finally:
            import ray

            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="package")
def two_nodes() -> Iterator[TwoNodes]:
    with started_nodes() as nodes:
        yield nodes


@pytest.fixture
def cluster(two_nodes: TwoNodes) -> Iterator[TwoNodes]:
    """Both nodes are there, with nothing on them, and this process is connected."""
    two_nodes.add_second()
    with connect(two_nodes.address):
        _await_free_cpus(2)
        yield two_nodes


def _await_free_cpus(count: int) -> None:
    """What the test before had on them takes a moment to end."""
    import ray

    deadline = time.monotonic() + FREE_SECONDS
    while (free := ray.available_resources().get("CPU", 0.0)) < count:
        assert time.monotonic() < deadline, f"{free} CPUs of {count} are free"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

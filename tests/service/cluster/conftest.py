"""Two replicas of the tiny model's sidecar behind a real Ray Serve, on two nodes of one machine."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from feature_bank.bank import Bank, save_bank
from feature_bank.ray_cluster import connect
from feature_bank.schema import Heads
from feature_bank.versions import VersionStore
from service.settings import Settings
from tests.deploy.prometheus import free_port
from tests.guard.onnx.conftest import exported  # noqa: F401 - a fixture
from tests.training.cluster.conftest import TwoNodes, started_nodes

PATIENCE = 120.0
CLIENT, ADMIN, READER = "a-key-of-a-client", "a-key-of-the-admin", "a-key-of-a-reader"
FLAG_ALL = {"name": "all", "rules": [{"domain": "violence", "threshold": {"probability": 0.001}, "action": "flag"}]}


@dataclass
class Served:
    """A running application: its address, its files, and what it was built of."""

    url: str
    settings: Settings
    store: Path
    banks: list[Path] = field(default_factory=list)
    """Two that can be used, and one whose canary is wrong."""
    nodes: TwoNodes | None = None
    """Where it runs."""

    def get(self, path: str, key: str = ADMIN) -> httpx.Response:
        return httpx.get(self.url + path, headers=bearer(key), timeout=PATIENCE)

    def post(self, path: str, body: Any, key: str = ADMIN) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=bearer(key), timeout=PATIENCE)

    def banks_in_use(self) -> dict[str, str]:
        """The bank, by replica, as answers name it."""
        return {
            sample.labels["replica"]: "{name}@{version}+{content_hash:.8}".format(**sample.labels)
            for sample in self._samples("sailguard_bank_info")
            if sample.value == 1
        }

    def series(self, name: str, **labels: str) -> dict[str, float]:
        """The samples of a metric that bear these labels, by replica."""
        return {
            sample.labels["replica"]: sample.value
            for sample in self._samples(name)
            if labels.items() <= sample.labels.items()
        }

    def _samples(self, name: str) -> list[Sample]:
        families = text_string_to_metric_families(self.get("/metrics", READER).text)
        return [sample for family in families for sample in family.samples if sample.name == name]


@dataclass
class Hammer:
    """Clients that ask without a break, and all that they were answered: statuses, and banks in the order they came."""

    url: str
    clients: int = 3
    statuses: list[int] = field(default_factory=list)
    banks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Hammer:
        self._threads = [threading.Thread(target=self._ask, name=f"client-{i}") for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        wait_for(lambda: len(self.statuses) >= 2 * self.clients)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _ask(self) -> None:
        with httpx.Client(headers=bearer(CLIENT), timeout=PATIENCE) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self.url}/v1/moderations", json={"input": ["a small bird", "two"]})
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))
                    continue
                self.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    self.banks.append(answer.json()["sailguard"]["bank"])
                else:
                    self.problems.append(answer.text)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def wait_for(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def version_of(source: Path, folder: Path, version: str, *, canary: float = 0.0) -> Path:
    """A copy of a bank under another version; `canary` is added to what its canary has to give."""
    bank = Bank.load(source)
    manifest = {**bank.manifest.model_dump(exclude={"schema_version", "files", "sha256"}), "version": version}
    activations = manifest["canary"]["activations"]
    manifest["canary"]["activations"] = {name: value + canary for name, value in activations.items()}
    heads = Heads(pooling=bank.pooling, heads=bank.heads)
    save_bank(folder, manifest=manifest, features=bank.features, heads=heads, rows=bank.rows)
    return folder


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:  # noqa: F811
    """The files of an application, and its settings; nothing runs yet."""
    top = tmp_path_factory.mktemp("served")
    banks = [version_of(exported / "bank", top / name, name) for name in ("1.0", "2.0")]
    wrong = version_of(exported / "bank", top / "3.0", "3.0", canary=5.0)
    VersionStore(top / "store").promote(banks[0])
    (top / "policy.yaml").write_text(yaml.safe_dump(FLAG_ALL))
    settings = Settings(
        port=free_port(),
        model=str(exported),
        bank=top / "store",
        policy=top / "policy.yaml",
        api_keys=CLIENT,
        api_keys_file=keys_file(top / "keys"),
        admin_keys=ADMIN,
        threads=1,
        watch_seconds=0.2,
        audit=top / "audit" / "audit.sqlite",
        max_body_bytes=65536,
    )
    return Served(f"http://127.0.0.1:{settings.port}", settings, top / "store", [*banks, wrong])


@pytest.fixture(scope="module")
def served(built: Served) -> Iterator[Served]:
    """Two replicas, one on each node."""
    from service.cluster.application import make_application
    from service.cluster.command import start_serve

    with started_nodes() as nodes, connect(add_second(nodes), "serve"):
        from ray import serve

        start_serve(built.settings)
        try:
            serve.run(make_application(built.settings, replicas=2), name="sailguard", route_prefix="/")
            built.nodes = nodes
            yield built
        finally:
            serve.shutdown()


def add_second(nodes: TwoNodes) -> str:
    """Add the second node; returns the address of the first."""
    nodes.add_second()
    return nodes.address


def keys_file(path: Path) -> Path:
    import hashlib

    path.write_text(f"sha256:{hashlib.sha256(READER.encode()).hexdigest()} prometheus reader\n")
    path.chmod(0o600)
    return path


def comparable(answer: httpx.Response) -> tuple[int, str, bytes]:
    """What has to be equal whoever answers: all but the id, byte for byte."""
    return answer.status_code, answer.headers["content-type"], re.sub(rb'"modr-[0-9a-f]{32}"', b"", answer.content)

"""A bank and a policy on the disk, an engine that was started on them, and its reloader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog

from guard.metrics import Metrics
from service.engine import EngineSlot
from service.reload import Reloader, ReloadResult
from service.settings import Settings
from service.watched import What
from tests.service.file_engine import PATIENCE, FileEngine, policy_text


class ModelThread:
    """The thread that engines are made on."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1)

    async def call(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        self._executor.shutdown()


class Site:
    """A bank and a policy on the disk, the engine that was started on them, and its reloader."""

    def __init__(self, bank: Path, policy: Path, thread: ModelThread, **settings: Any) -> None:
        self.bank, self.policy = bank, policy
        self.metrics = Metrics()
        self.first = FileEngine.start(bank, policy, self.metrics)
        self.world = self.first.world
        self.slot = EngineSlot(self.first)
        self.lines: list[dict[str, Any]] = []
        logger = structlog.wrap_logger(None, processors=[self._keep])
        chosen = Settings(bank=bank, policy=policy, **{"watch_seconds": 0.0, **settings})
        self.reloader = Reloader(self.slot, thread, chosen, self.metrics, logger)

    def _keep(self, _logger: Any, _name: str, event: dict[str, Any]) -> Any:
        self.lines.append(event)
        raise structlog.DropEvent

    def reload(self, what: What = "all") -> ReloadResult:
        return asyncio.run(self.reloader.reload(what, reason="test"))

    def count(self, what: str, result: str) -> float | None:
        return self.metrics.registry.get_sample_value("sailguard_reloads_total", {"what": what, "result": result})

    def behind(self, what: str) -> float | None:
        return self.metrics.registry.get_sample_value("sailguard_version_behind", {"what": what})

    def in_use(self) -> tuple[str, str]:
        assert self.slot.engine is not None
        return self.slot.engine.bank_version, self.slot.engine.policy_version


@pytest.fixture
def thread() -> Iterator[ModelThread]:
    thread = ModelThread()
    yield thread
    thread.close()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text())
    return path


@pytest.fixture
def site(bank: Path, policy: Path, thread: ModelThread) -> Site:
    return Site(bank, policy, thread)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)

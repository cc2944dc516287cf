"""Training resumes exactly, refuses what would spoil it, and finds sparse structure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.sae import SAE
from tests.training.samples import sparse_data
from training.architectures import StepStats
from training.trainer import TrainerConfig, inliers, learning_rate, train_sae

HOOK = "blocks.0.hook_resid_post"
# 12 steps in two epochs, a checkpoint after 5 and 10, and dead features from the second step on
CONFIG = TrainerConfig(expansion=3, k=2, batch_tokens=32, epochs=2, dead_after_tokens=40, checkpoint_every=5)
STEPS = 12


class StopTrainingError(Exception):
    """What interrupts a run here."""


def train(
    data: Tensor, folder: Path, config: TrainerConfig = CONFIG, stop_at: int | None = None
) -> tuple[SAE, StepStats]:
    def on_step(step: int, steps: int, stats: StepStats) -> None:
        if step == stop_at:
            raise StopTrainingError

    return train_sae(data, HOOK, folder, config, on_step=on_step)


def assert_same(found: tuple[SAE, StepStats], expected: tuple[SAE, StepStats]) -> None:
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(found[0], name), getattr(expected[0], name)), name
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def data() -> Tensor:
    return sparse_data(200, d_in=8, features=12, active=2).to(torch.bfloat16)


@pytest.fixture(scope="module")
def whole(data: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[SAE, StepStats]:
    """A run that nothing interrupted."""
    seen: list[StepStats] = []
    result = train_sae(
        data, HOOK, tmp_path_factory.mktemp("whole"), CONFIG, on_step=lambda step, steps, stats: seen.append(stats)
    )
    assert len(seen) == STEPS
    assert max(stats.dead_fraction for stats in seen) > 0  # or the clocks of dead features would not be tested
    return result


@pytest.mark.parametrize("stop_at", range(1, STEPS + 1))
def test_interrupted_at_any_step_it_ends_the_same(
    tmp_path: Path, data: Tensor, whole: tuple[SAE, StepStats], stop_at: int
) -> None:
    with pytest.raises(StopTrainingError):
        train(data, tmp_path / "run", stop_at=stop_at)
    assert [p.name for p in tmp_path.iterdir()] == (["run"] if stop_at > 5 else [])
    assert_same(train(data, tmp_path / "run"), whole)


def test_interrupted_again_and_again_it_ends_the_same(
    tmp_path: Path, data: Tensor, whole: tuple[SAE, StepStats]
) -> None:
    often = dataclasses.replace(CONFIG, checkpoint_every=1)
    for stop_at in range(2, STEPS + 1):
        with pytest.raises(StopTrainingError):
            train(data, tmp_path / "run", often, stop_at=stop_at)
    assert_same(train(data, tmp_path / "run", often), whole)
    assert_same(train(data, tmp_path / "run", often), whole)  # a finished run is read back
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("change", [{"k": 3}, {"lr": 1e-3}, {"seed": 1}, {"batch_tokens": 31}, {"expansion": 4}])
def test_a_checkpoint_of_another_configuration_is_refused(
    tmp_path: Path, data: Tensor, change: dict[str, float]
) -> None:
    train(data, tmp_path / "run")
    with pytest.raises(DataError, match="run belongs to another configuration"):
        train(data, tmp_path / "run", dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]  # ints are ints
    with pytest.raises(DataError, match="run belongs to another configuration"):
        train(data[:-1], tmp_path / "run")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 150])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, data: Tensor, value: float, rows: int) -> None:
    broken = data.clone()
    broken[-rows:, 2] = value
    with pytest.raises(DataError, match=rf"{HOOK}.*NaN or infinity"):
        train(broken, tmp_path / "run")


def test_less_than_one_batch_is_refused(tmp_path: Path, data: Tensor) -> None:
    with pytest.raises(DataError, match=f"31 activations at {HOOK} are fewer than one batch of 32"):
        train(data[:31], tmp_path / "run")


def test_outliers_are_left_out_and_the_rest_is_trained(
    tmp_path: Path, data: Tensor, whole: tuple[SAE, StepStats]
) -> None:
    outlier = 1000 * data[:1]
    mixed = torch.cat([data[:50], outlier, data[50:]])
    assert inliers(mixed).tolist() == [i != 50 for i in range(201)]
    assert_same(train(mixed, tmp_path / "run"), whole)


def test_training_finds_sparse_structure(tmp_path: Path) -> None:
    data = sparse_data(1024)
    config = TrainerConfig(expansion=4, k=3, batch_tokens=128, epochs=15, lr=5e-3, dead_after_tokens=2000)
    seen: list[StepStats] = []
    sae, stats = train_sae(data, HOOK, tmp_path / "run", config, on_step=lambda step, steps, s: seen.append(s))
    assert stats.fvu < 0.3 * seen[0].fvu
    assert stats.fvu < 0.2
    assert stats.l0 == pytest.approx(3.0)
    out = sae.decode(sae.encode(data))
    assert float((data - out).pow(2).sum() / (data - data.mean(0)).pow(2).sum()) < 0.5 * seen[0].fvu


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TrainerConfig(lr=1.0, warmup_fraction=0.1, decay_fraction=0.5)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10:51] == [1.0] * 41
    assert rates[51:] == [pytest.approx((100 - i) / 50) for i in range(51, 100)]
    assert all(0 < learning_rate(step, n, config) <= 1 for n in (1, 2, 3) for step in range(n))

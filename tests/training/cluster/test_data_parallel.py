"""One SAE that two workers of a cluster train together, also when a node is lost, has the weights of one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.cluster.conftest import TwoNodes, started_nodes
from tests.training.cluster.samples import BATCH, RAY, SlowReader, saes, toy
from tests.training.samples import TOY_HOOKS
from training.architectures import StepStats
from training.cache import Harvest
from training.checkpoints import TENSORS_FILE
from training.cluster.training import train_saes_on_cluster
from training.runs import SaeRun
from training.trainer import TrainedSae, train_saes

pytestmark = RAY
EACH = BATCH // 3  # so that two workers take part
EPOCHS = 2


class SignedReader(SlowReader):
    """A reader that leaves the number of its process and of the step that it began at."""

    folder: Path

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Tensor]]:
        (self.folder / f"{os.getpid()}-{start_step}").touch()
        yield from super().batches(start_step)


def signed(cache: Harvest, folder: Path, pause: float = 0.0) -> SignedReader:
    folder.mkdir(exist_ok=True)
    found = SignedReader(cache, TOY_HOOKS, batch_tokens=BATCH, seed=1)
    found.folder, found.pause = folder, pause
    return found


def starts(folder: Path) -> list[int]:
    """The step that each reading of the activations began at."""
    return sorted(int(path.name.split("-")[1]) for path in folder.iterdir())


def one() -> list[SaeRun]:
    return saes(EPOCHS)[1:2]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    """A cluster of its own: Ray is slow to give a training room on a node that came back after others' tests."""
    with started_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return toy(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def alone(cache: Harvest, tmp_path_factory: pytest.TempPathFactory) -> TrainedSae:
    """The SAE of a training in one process."""
    reader = signed(cache, tmp_path_factory.mktemp("signs"))
    return train_saes(reader, one(), tmp_path_factory.mktemp("alone"))[0]


def assert_close(found: TrainedSae, expected: TrainedSae) -> None:
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        ours, theirs = getattr(found.load(), name), getattr(expected.load(), name)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)
    for name in (*StepStats._fields, "steps", "tokens"):
        assert found.figures[name] == pytest.approx(expected.figures[name], rel=1e-3), name


class StoppedError(Exception):
    """Ends a training in the middle."""


def test_what_one_process_began_two_workers_end_together(
    cluster: TwoNodes, cache: Harvest, alone: TrainedSae, tmp_path: Path
) -> None:
    def stop(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        if step == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        train_saes(signed(cache, tmp_path / "first"), one(), tmp_path / "out", on_step=stop)
    said: list[int] = []
    (found,) = train_saes_on_cluster(
        signed(cache, tmp_path / "signs"),
        one(),
        tmp_path / "out",
        on_step=lambda run, step, steps, stats: said.append(step),
        rows_each=EACH,
    )
    assert starts(tmp_path / "signs") == [5, 5]  # two processes, from the checkpoint of the first
    assert said == sorted(said)
    assert said[-1] == found.figures["steps"]
    assert_close(found, alone)


def test_a_node_that_is_killed_leaves_the_rest_to_the_other_from_the_last_checkpoint(
    cluster: TwoNodes, cache: Harvest, alone: TrainedSae, tmp_path: Path
) -> None:
    killed_at: list[int] = []

    def on_step(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        if not killed_at and list(tmp_path.glob(f"checkpoints/**/step-*/{TENSORS_FILE}")):
            cluster.kill_second()
            killed_at.append(step)

    reader = signed(cache, tmp_path / "signs", pause=0.2)
    (found,) = train_saes_on_cluster(reader, one(), tmp_path, on_step=on_step, rows_each=EACH)
    assert killed_at
    first, second, *later = starts(tmp_path / "signs")
    assert (first, second) == (0, 0)
    assert later[-1] >= 5
    assert later[-1] % 5 == 0
    assert_close(found, alone)

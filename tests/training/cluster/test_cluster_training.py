"""SAEs that are trained on a cluster have the weights of those that are trained here, whatever is killed on the way."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from feature_bank.errors import DataError
from feature_bank.formats.saelens import WEIGHTS_FILE
from tests.training.cluster.conftest import TwoNodes
from tests.training.cluster.samples import BATCH, RAY, UnseenReader, reader, saes, toy
from tests.training.samples import TOY_HOOKS
from training.architectures import StepStats
from training.cache import Harvest
from training.cluster.training import STATE_FOLDER, shares, train_saes_on_cluster
from training.runs import SaeRun
from training.trainer import TrainedSae, sae_file, train_saes

pytestmark = RAY
TIMES = ("seconds", "tokens_per_second")


def outcome(trained: list[TrainedSae]) -> list[tuple[str, bytes, dict[str, float]]]:
    """What must not depend on where a run was trained."""
    return [
        (
            sae.run.name,
            (sae.folder / WEIGHTS_FILE).read_bytes(),
            {name: value for name, value in sae.figures.items() if name not in TIMES},
        )
        for sae in trained
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return toy(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def alone(cache: Harvest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes, dict[str, float]]]:
    """The SAEs of a training in one process."""
    return outcome(train_saes(reader(cache), saes(), tmp_path_factory.mktemp("alone"), model_name="toy"))


def test_every_run_is_in_one_share_and_none_has_much_more_than_another() -> None:
    runs = saes()
    costs = {run.name: float(run.config.expansion) for run in runs}
    for workers in (1, 2, 3, 5):
        parts = shares(runs, costs, workers)
        assert len(parts) == workers
        assert Counter(run.name for part in parts for run in part) == Counter(run.name for run in runs)
    assert [sum(costs[run.name] for run in part) for part in shares(runs, costs, 2)] == [5.0, 5.0]


def test_a_run_that_cannot_be_trained_is_named_and_the_others_are_those_of_a_training_in_one_process(
    cluster: TwoNodes, cache: Harvest, alone: list[tuple[str, bytes, dict[str, float]]], tmp_path: Path
) -> None:
    _, good, *_ = saes()  # the costlier one, so that each is alone on its worker
    bad = SaeRun(TOY_HOOKS[0], dataclasses.replace(saes()[0].config, lr=1e30, clip_norm=None), name="bad")
    with pytest.raises(DataError, match=r"bad, step \d+: the gradient"):
        train_saes_on_cluster(reader(cache), [good, bad], tmp_path, model_name="toy")
    assert sae_file(good, tmp_path).exists()  # trained to its end, whether or not that was reported
    assert not (tmp_path / STATE_FOLDER).exists()
    found = train_saes_on_cluster(reader(cache), [good], tmp_path)  # what is finished is not trained again
    assert outcome(found) == [expected for expected in alone if expected[0] == good.name]


def test_a_cache_that_a_machine_does_not_see_is_named_and_not_called_damaged(
    cluster: TwoNodes, cache: Harvest, tmp_path: Path
) -> None:
    unseen = UnseenReader(cache, TOY_HOOKS, batch_tokens=BATCH, seed=1)
    with pytest.raises(DataError, match=r"shard-00000.safetensors is not seen on machine .* storage that every"):
        train_saes_on_cluster(unseen, saes()[:1], tmp_path, model_name="toy")


def test_a_node_that_is_killed_costs_no_more_than_the_steps_since_the_checkpoints(
    cluster: TwoNodes, cache: Harvest, alone: list[tuple[str, bytes, dict[str, float]]], tmp_path: Path
) -> None:
    killed_at: dict[str, int] = {}
    after: dict[str, int] = {}

    def on_step(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        if not killed_at and len(list(tmp_path.glob("checkpoints/**/step-*"))) >= len(saes()):
            cluster.kill_second()
            killed_at[run.name] = step
        elif killed_at:
            after.setdefault(run.name, step)

    found = train_saes_on_cluster(reader(cache, pause=0.2), saes(), tmp_path, on_step=on_step, model_name="toy")
    assert killed_at
    assert cluster.second is None
    assert after
    assert min(after.values()) > 1  # they went on from checkpoints
    assert outcome(found) == alone

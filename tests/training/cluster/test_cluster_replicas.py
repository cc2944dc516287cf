"""Several replicas train as one process does: the same gradients, figures and choices; and they never come apart.

The members of a group are threads here, which meet through gloo as processes do.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from feature_bank.errors import DataError
from tests.training.samples import sparse_data
from tests.training.test_architectures import HOOK, HOOK_OUT, NAMES, OPTIONS, K, create, target_of
from training.architectures import ARCHITECTURES, StepStats
from training.batches import Batch, TensorReader
from training.cluster.replicas import GroupedReplicas
from training.cluster.training import teams
from training.replicas import ALONE, Replicas
from training.run_state import RunState
from training.runs import SaeRun, TrainerConfig
from training.trainer import TrainedSae, train_claimed, train_saes

T = TypeVar("T")
BATCH = 64
# In float32 a sum that is added in another order differs by some 1e-7 of it, and Adam divides small gradients by their
# own size: weights differ by up to 1e-5 of the decoder's rows' length
ATOL = 5e-5


def together(size: int, batch: int, work: Callable[[Replicas], T]) -> list[T]:
    """What `work` gives in each member of a group. An error of any is raised here."""
    store = dist.HashStore()

    def member(rank: int) -> T:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        return work(GroupedReplicas(group, batch))

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(member, rank) for rank in range(size)]]


# ---- what they tell each other -------------------------------------------------------------------


def test_sums_choices_and_what_the_first_says_are_the_same_in_all() -> None:
    def work(replicas: Replicas) -> Any:
        rank = replicas.rank
        big = torch.full((2, 3), float(rank + 1))
        replicas.add_up([big])
        counts, fired = replicas.sums(torch.tensor([2**40, rank]), torch.tensor([rank == 1, False]))
        copied = torch.full((2,), float(rank))
        return (
            big.tolist(),
            (counts.tolist(), fired.tolist()),
            replicas.least(5.5 - rank),
            replicas.gather(torch.arange(rank, dtype=torch.float32)).tolist(),
            (replicas.copy_first([copied]), copied.tolist(), replicas.copy_first([copied])),
            replicas.lead(lambda: {"rank": rank, "é": None}),
            replicas.each(lambda: rank) == rank,
        )

    expected = (
        [[6.0] * 3] * 2,
        ([3 * 2**40, 3], [True, False]),
        3.5,
        [0.0, 0.0, 1.0],
        (True, [0.0, 0.0], False),
        {"rank": 0, "é": None},
        True,
    )
    assert together(3, BATCH, work) == [expected] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_the_parts_of_a_batch_are_the_batch_and_none_is_a_row_larger_than_another(size: int) -> None:
    whole = {HOOK: torch.arange(2.0 * BATCH).reshape(BATCH, 2)}

    def part(rank: int) -> Tensor:
        group = type("Group", (), {"rank": lambda _: rank, "size": lambda _: size})()
        (found,) = GroupedReplicas(group, BATCH).parts(iter([whole]))
        return found[HOOK]

    parts = [part(rank) for rank in range(size)]
    assert torch.equal(torch.cat(parts), whole[HOOK])
    assert {len(p) for p in parts} <= {BATCH // size, BATCH // size + 1}


def test_an_error_of_one_is_raised_in_all() -> None:
    def fail() -> None:
        raise DataError("no room")

    def work(replicas: Replicas) -> None:
        for call in (
            lambda: replicas.lead(fail),
            lambda: replicas.each(fail if replicas.rank == 1 else lambda: None),
        ):
            with pytest.raises(DataError, match="no room"):
                call()

    together(3, BATCH, work)


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_figures_and_buffers_are_those_of_the_whole_batch(name: str, size: int) -> None:
    data = sparse_data(4 * BATCH).double()
    batches = torch.split(data, BATCH)

    def train(replicas: Replicas) -> list[tuple[dict[str, Tensor], StepStats, dict[str, Tensor]]]:
        """In double precision, so that the order of a sum is all but without effect."""
        sae = create(name, data, dead_after_tokens=BATCH)
        sae.replicas = replicas
        optimiser = torch.optim.Adam(list(sae.parameters().values()), lr=3e-2)
        found = []
        for i, batch in enumerate(batches * 2):
            (part,) = replicas.parts(iter([{HOOK: batch, HOOK_OUT: target_of(batch)}]))
            grads, stats = sae.gradients(part[HOOK], part[HOOK_OUT] if name == "skip_transcoder" else None, i / 8)
            replicas.add_up(grads.values())
            found.append(({k: g.clone() for k, g in grads.items()}, stats, sae.buffers()))
            for key, parameter in sae.parameters().items():
                parameter.grad = grads[key]
            optimiser.step()
            sae.renormalise()
        return found

    alone = train(ALONE)
    members = together(size, BATCH, train)
    if hasattr(ARCHITECTURES[name].Options(), "aux_k"):
        assert any(stats.dead_fraction > 0 for _, stats, _ in alone)  # the auxiliary loss takes part
    for step, (grads, stats, buffers) in enumerate(alone):
        for found in members:
            assert found[step][1] == pytest.approx(stats, rel=1e-9), step
            for kind, expected in ((0, grads), (2, buffers)):
                for key, value in expected.items():
                    torch.testing.assert_close(found[step][kind][key], value, rtol=1e-7, atol=1e-9)
                    assert torch.equal(found[step][kind][key], members[0][step][kind][key]), key


def test_a_selection_from_a_batch_does_not_depend_on_whose_rows_are_large() -> None:
    """The first bound comes from each member's own rows; the threshold is exact whatever they are."""
    data = sparse_data(BATCH).double()
    data[: BATCH // 2] *= 0.01  # hardly anything of the first member's is active

    def select(replicas: Replicas) -> tuple[float, int]:
        sae = create("batch_topk", data)
        sae.replicas = replicas
        (part,) = replicas.parts(iter([{HOOK: data}]))
        for _ in range(3):  # with the last cut as a guess too
            acts = sae._select((part[HOOK] / sae.norm) - sae.b_dec)
        return sae.threshold, acts.values.numel()

    threshold, number = select(ALONE)
    found = together(2, BATCH, select)
    assert [cut for cut, _ in found] == [pytest.approx(threshold, rel=1e-12)] * 2
    assert sum(n for _, n in found) == number == K * BATCH
    assert found[0][1] < found[1][1]


# ---- a training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> TensorReader:
    data = sparse_data(8 * BATCH + 5)
    return TensorReader({HOOK: data, HOOK_OUT: target_of(data)}, batch_tokens=BATCH, seed=2)


def run_of(name: str, **settings: Any) -> SaeRun:
    options = OPTIONS.get(name, {"k": K})
    fields = {"expansion": 3, "batch_tokens": BATCH, "epochs": 4, "dead_after_tokens": 3 * BATCH, "prefetch": 0}
    config = TrainerConfig(architecture=name, options=options, **{**fields, **settings})
    return SaeRun(HOOK, config, hook_name_out=HOOK_OUT if name == "skip_transcoder" else None, name="one")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_one_process_but_for_rounding_and_equal_to_the_bit_in_all(
    name: str, reader: TensorReader
) -> None:
    run = run_of(name)
    steps = reader.steps_per_epoch * run.config.epochs

    def train(replicas: Replicas) -> tuple[dict[str, Tensor], list[StepStats]]:
        state = RunState(run, reader.sample(10_000), steps=steps, replicas=replicas)
        state.align()
        batches = replicas.parts(reader.batches(0))
        stats = []
        for _ in range(steps):
            state.advance(next(batches))
            stats += state.settle()
        return dict(state.checkpoint().tensors), stats

    alone, expected = train(ALONE)
    members = together(3, BATCH, train)
    for key, value in alone.items():
        for found, _ in members:
            assert torch.equal(found[key], members[0][0][key]), key
        scale = 1.0 if key.startswith(("exp_avg", "buffer")) else 0.0  # of numbers that are not near 1
        torch.testing.assert_close(members[0][0][key], value, rtol=1e-3 * scale, atol=ATOL)
    assert all(stats == members[0][1] for _, stats in members)
    assert members[0][1][-1] == pytest.approx(expected[-1], rel=1e-3, abs=1e-6)


class StoppedError(Exception):
    """Ends a training in the middle."""


def test_a_run_goes_on_in_any_number_of_processes(tmp_path: Path, reader: TensorReader) -> None:
    run = run_of("batch_topk", checkpoint_every=5, checkpoint_seconds=0.0)
    (whole,) = train_saes(reader, [run], tmp_path / "whole")
    folder = tmp_path / "parts"
    first: set[tuple[int, int, int]] = set()

    def train(replicas: Replicas, until: int | None) -> list[TrainedSae]:
        seen: list[int] = []

        def on_step(_run: SaeRun, step: int, steps: int, _stats: StepStats) -> None:
            seen.append(step)
            if step == until:
                first.add((replicas.size, replicas.rank, seen[0]))
                raise StoppedError

        return train_claimed(reader, [run], folder, on_step=on_step, replicas=replicas)

    for size, until in ((1, 7), (3, 17), (2, 28)):
        with pytest.raises(StoppedError):
            together(size, BATCH, lambda replicas, until=until: train(replicas, until))
    assert first == {(1, 0, 1), (3, 0, 6), (3, 1, 6), (3, 2, 6), (2, 0, 16), (2, 1, 16)}
    (found,) = train(ALONE, None)
    assert (found.figures["steps"], found.figures["tokens"]) == (32, 32 * BATCH)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        torch.testing.assert_close(getattr(found.load(), name), getattr(whole.load(), name), rtol=1e-3, atol=ATOL)
    assert {n: found.figures[n] for n in StepStats._fields} == pytest.approx(
        {n: whole.figures[n] for n in StepStats._fields}, rel=1e-3
    )
    again = together(2, BATCH, lambda replicas: train(replicas, 0))  # what is finished is not trained again
    assert again == [[found]] * 2


def test_what_one_cannot_go_on_with_ends_all(tmp_path: Path, reader: TensorReader) -> None:
    run = run_of("topk", checkpoint_every=5, checkpoint_seconds=0.0)
    (tmp_path / "checkpoints").touch()  # the first one cannot write there

    class Broken(TensorReader):
        def batches(self, start_step: int) -> Iterator[Batch]:
            yield next(super().batches(start_step))
            raise DataError("shard 3 is damaged")

    rows = sparse_data(8 * BATCH)
    broken = Broken({HOOK: rows}, batch_tokens=BATCH)
    sound = TensorReader({HOOK: rows}, batch_tokens=BATCH)

    def train(replicas: Replicas, bad: TensorReader, folder: Path) -> str:
        with pytest.raises(DataError) as raised:
            train_claimed(bad if replicas.rank == 1 else sound, [run], folder, replicas=replicas)
        return str(raised.value)

    for bad, folder, message in ((sound, tmp_path, "step 5 cannot be written"), (broken, tmp_path / "new", "shard 3")):
        found = together(2, BATCH, lambda replicas, bad=bad, folder=folder: train(replicas, bad, folder))
        assert found[0] == found[1]
        assert message in found[0]


def test_replicas_that_come_apart_are_brought_together_and_it_is_said(
    tmp_path: Path, reader: TensorReader, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of("topk")

    def train(replicas: Replicas) -> tuple[bool, dict[str, Tensor]]:
        state = RunState(run, reader.sample(10_000), steps=32, replicas=replicas)
        state.align()
        batches = replicas.parts(reader.batches(0))
        state.advance(next(batches))
        state.settle()
        state.align()
        quiet = not caplog.records
        replicas.lead(lambda: None)  # all have looked
        if replicas.rank == 1:  # as a processor of another kind would in time
            state._parameters["W_dec"][3] += 1e-6
        state.align()
        return quiet, dict(state.checkpoint().tensors)

    with caplog.at_level(logging.WARNING):
        found = together(2, BATCH, train)
    assert all(quiet for quiet, _ in found)
    assert "one: the replicas' weights had come apart by step 1" in caplog.text
    for key, value in found[0][1].items():
        assert torch.equal(found[1][1][key], value), key


# ---- who trains what -----------------------------------------------------------------------------


def test_workers_that_are_left_over_help_where_a_worker_has_most_to_do_and_rows_enough() -> None:
    base = TrainerConfig(batch_tokens=100)
    runs = [SaeRun(HOOK, base, name=n) for n in "abc"]
    runs[2] = dataclasses.replace(runs[2], config=dataclasses.replace(base, batch_tokens=59))
    costs = {"a": 1.0, "b": 6.0, "c": 9.0}
    sizes = {workers: [len(team.ranks) for team in teams(runs, costs, workers, 30)] for workers in range(3, 10)}
    assert sizes == {3: [1] * 3, 4: [1, 2, 1], 5: [1, 3, 1], 6: [2, 3, 1], 7: [3, 3, 1], 8: [3, 3, 1], 9: [3, 3, 1]}
    found = teams(runs, costs, 6, 30)
    assert [team.ranks for team in found] == [(0, 1), (2, 3, 4), (5,)]
    assert [[run.name for run in team.runs] for team in found] == [["a"], ["b"], ["c"]]
    assert [[run.name for run in team.runs] for team in teams(runs, costs, 2, 1)] == [["c"], ["b", "a"]]
    assert teams([], {}, 2, 1) == []

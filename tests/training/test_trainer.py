"""The trainer trains many SAEs at once as it trains each alone, refuses what would spoil one, and finds structure."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.formats.saelens import load_saelens
from feature_bank.sae import SAE
from tests.training.samples import sparse_data
from training.architectures import ARCHITECTURES, StepStats
from training.batches import Batch, TensorReader, read_ahead
from training.trainer import SaeRun, TrainerConfig, inliers, learning_rate, train_sae, train_saes

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
CONFIG = TrainerConfig(options={"k": 2}, expansion=3, batch_tokens=32, epochs=2, dead_after_tokens=40)
STEPS = 12


@pytest.fixture(scope="module")
def data() -> Tensor:
    return sparse_data(200, d_in=8, features=12, active=2).to(torch.bfloat16)


@pytest.fixture
def reader(data: Tensor) -> TensorReader:
    return TensorReader({HOOK: data, OTHER: data.flip(1) * 3}, batch_tokens=32)


def several() -> list[SaeRun]:
    return [
        SaeRun(hook, dataclasses.replace(CONFIG, options={"k": k}, seed=seed))
        for hook in (HOOK, OTHER)
        for k in (1, 2)
        for seed in (0, 1)
    ]


def assert_same_sae(found: SAE, expected: SAE) -> None:
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# ---- many at once --------------------------------------------------------------------------------


def test_each_of_many_is_what_it_is_alone(tmp_path: Path, reader: TensorReader) -> None:
    runs = several()
    together = train_saes(reader, runs, tmp_path / "together")
    assert [sae.run for sae in together] == runs
    assert len({sae.folder for sae in together}) == 8
    for number, sae in enumerate(together):
        (alone,) = train_saes(reader, [sae.run], tmp_path / f"alone-{number}")
        assert_same_sae(sae.load(), alone.load())
        assert [sae.figures[n] for n in StepStats._fields] == [alone.figures[n] for n in StepStats._fields]
    weights = {sae.load().W_enc.sum().item() for sae in together}
    assert len(weights) == 8


def test_the_activations_are_read_once_for_all(tmp_path: Path, reader: TensorReader, data: Tensor) -> None:
    starts, read = [], []

    class Counting(TensorReader):
        def batches(self, start_step: int) -> Iterator[Batch]:
            starts.append(start_step)
            for batch in super().batches(start_step):
                read.append(1)
                yield batch

    train_saes(
        Counting({HOOK: data, OTHER: data}, batch_tokens=32),
        [dataclasses.replace(r, config=dataclasses.replace(r.config, prefetch=0)) for r in several()],
        tmp_path,
    )
    assert (starts, len(read)) == ([0], STEPS)


def test_runs_of_different_length_each_end_in_time(tmp_path: Path, reader: TensorReader) -> None:
    seen: dict[str, list[int]] = {}
    runs = [SaeRun(HOOK, dataclasses.replace(CONFIG, epochs=e), name=f"e{e}") for e in (3, 1, 2)]
    found = train_saes(
        reader, runs, tmp_path, on_step=lambda run, step, steps, _: seen.setdefault(run.name, []).append(step)
    )
    assert [sae.figures["steps"] for sae in found] == [18, 6, 12]
    assert seen == {f"e{e}": list(range(1, 6 * e + 1)) for e in (1, 2, 3)}
    for sae in found:  # and none was changed by those that went on
        (alone,) = train_saes(reader, [sae.run], tmp_path / "alone")
        assert_same_sae(sae.load(), alone.load())


def test_a_finished_sae_is_never_trained_again(tmp_path: Path, reader: TensorReader) -> None:
    first = train_saes(reader, several()[:3], tmp_path)
    before = {sae.folder: (sae.folder / "sae_weights.safetensors").stat().st_mtime_ns for sae in first}
    trained: set[str] = set()
    everything = train_saes(reader, several(), tmp_path, on_step=lambda run, *_: trained.add(run.name))
    assert trained == {run.name for run in several()[3:]}
    assert everything[:3] == first
    assert {f: (f / "sae_weights.safetensors").stat().st_mtime_ns for f in before} == before
    assert train_saes(reader, several(), tmp_path, on_step=lambda *_: pytest.fail("a step")) == everything
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))


def test_every_sae_is_a_saelens_folder_with_its_settings_and_figures(tmp_path: Path, reader: TensorReader) -> None:
    for sae in train_saes(reader, several(), tmp_path, model_name="toy"):
        record = json.loads((sae.folder / "cfg.json").read_text())["metadata"]
        assert (record["model_name"], record["hook_name"]) == ("toy", sae.run.hook_name)
        assert record["training"]["figures"] == sae.figures
        assert record["training"]["fingerprint"]["config"]["options"]["k"] == sae.run.config.options["k"]
        assert sae.figures["tokens"] == STEPS * 32
        assert 0 < sae.figures["fvu"] < 2
        assert sae.figures["tokens_per_second"] > 0
        assert load_saelens(sae.folder).hook_name == sae.run.hook_name


def test_the_global_random_state_neither_matters_nor_changes(tmp_path: Path, reader: TensorReader) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    (first,) = train_saes(reader, [SaeRun(HOOK, CONFIG)], tmp_path / "a", on_step=lambda *_: torch.rand(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    (second,) = train_saes(reader, [SaeRun(HOOK, CONFIG)], tmp_path / "b")
    assert_same_sae(first.load(), second.load())


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_reading_ahead_changes_nothing(tmp_path: Path, reader: TensorReader, prefetch: int) -> None:
    threads = threading.active_count()
    config = dataclasses.replace(CONFIG, prefetch=prefetch)
    (ahead,) = train_saes(reader, [SaeRun(HOOK, config)], tmp_path / "ahead")
    (plain,) = train_saes(reader, [SaeRun(HOOK, CONFIG)], tmp_path / "plain")
    assert_same_sae(ahead.load(), plain.load())
    assert threading.active_count() == threads


def test_a_failing_source_is_heard_and_its_thread_ends() -> None:
    def source() -> Iterator[Batch]:
        yield {"a": torch.zeros(1)}
        raise DataError("the disk is gone")

    threads = threading.active_count()
    with read_ahead(source(), 2) as batches:
        assert torch.equal(next(batches)["a"], torch.zeros(1))
        with pytest.raises(DataError, match="the disk is gone"):
            next(batches)
    with read_ahead(iter([{"a": torch.zeros(1)}] * 9), 2) as batches:
        next(batches)  # and is left with the thread waiting for room
    assert threading.active_count() == threads


# ---- the step ------------------------------------------------------------------------------------


def test_training_finds_sparse_structure(tmp_path: Path) -> None:
    data = sparse_data(1024)
    config = TrainerConfig(options={"k": 3}, expansion=4, batch_tokens=128, epochs=15, lr=5e-3, dead_after_tokens=2000)
    seen: list[StepStats] = []
    sae, stats = train_sae(data, HOOK, tmp_path / "run", config, on_step=lambda step, steps, s: seen.append(s))
    assert len(seen) == 120
    assert stats.fvu < 0.3 * seen[0].fvu
    assert stats.fvu < 0.2
    assert stats.l0 == pytest.approx(3.0)
    out = sae.decode(sae.encode(data))
    assert float((data - out).pow(2).sum() / (data - data.mean(0)).pow(2).sum()) < 0.5 * seen[0].fvu


class Scripted:
    """An architecture whose gradients a test decides: a parameter with the given gradient at each step."""

    gradient = torch.ones(4)

    def __init__(self) -> None:
        self.w = torch.zeros(4)
        self.seen: list[tuple[float, torch.dtype]] = []

    def parameters(self) -> dict[str, Tensor]:
        return {"w": self.w}

    def gradients(self, x: Tensor, target: Tensor | None, progress: float) -> tuple[dict[str, Tensor], StepStats]:
        self.seen.append((progress, (x @ x.T).dtype))
        return {"w": self.gradient.clone()}, StepStats(1.0, 1.0, 0.0)

    def renormalise(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a RunState around `Scripted`."""
    from training import run_state

    class Options:
        @staticmethod
        def model_validate(options: dict[str, Any]) -> None:
            return None

    made = Scripted()
    stand_in = type("StandIn", (), {"Options": Options, "create": staticmethod(lambda *_, **__: made)})
    monkeypatch.setitem(run_state.ARCHITECTURES, "scripted", stand_in)

    def make(**settings: Any) -> tuple[run_state.RunState, Scripted]:
        config = TrainerConfig(architecture="scripted", **{"device": "cpu", "lr": 0.1, **settings})
        return run_state.RunState(SaeRun(HOOK, config), {HOOK: torch.ones(3, 4)}, steps=10), made

    return make


@pytest.mark.parametrize("size", [1e-3, 0.49, 0.51, 7.0, 1e6])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_is_adam_on_the_clipped_gradient(scripted: Any, size: float, clip: float | None) -> None:
    state, sae = scripted(clip_norm=clip, betas=(0.8, 0.9))
    w = torch.zeros(4, requires_grad=True)
    plain = torch.optim.Adam([w], lr=0.1, betas=(0.8, 0.9))
    for step in range(10):
        sae.gradient = torch.tensor([1.0, -0.5, 2.0, 0.0]) * size * (1 + step)
        w.grad = sae.gradient.clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([w], clip)
        plain.param_groups[0]["lr"] = learning_rate(step, 10, state.run.config)
        plain.step()
        assert state.advance({HOOK: torch.ones(2, 4)})
        state.settle()
        torch.testing.assert_close(sae.w, w.detach(), rtol=1e-5, atol=1e-7)
    assert [progress for progress, _ in sae.seen] == [step / 10 for step in range(10)]


def test_a_gradient_that_lies_otherwise_in_memory_is_still_the_same(scripted: Any) -> None:
    moved = []
    for transposed in (False, True):
        state, sae = scripted()
        sae.w = state._parameters["w"] = torch.zeros(2, 3)
        state._optimiser.param_groups[0]["params"] = [sae.w]
        gradient = torch.arange(6.0).reshape(2, 3)
        sae.gradient = gradient.T.contiguous().T if transposed else gradient
        sae.gradients = lambda *_, sae=sae, **__: ({"w": sae.gradient}, StepStats(1.0, 1.0, 0.0))
        state._gradients = sae.gradients
        state.advance({HOOK: torch.ones(2, 4)})
        moved.append(sae.w.clone())
    assert torch.equal(*moved)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_it_spoils_the_weights(scripted: Any, value: float) -> None:
    state, sae = scripted()
    state.advance({HOOK: torch.ones(2, 4)})
    before = sae.w.clone()
    sae.gradient = torch.tensor([1.0, value, 1.0, 1.0])
    with pytest.raises(DataError, match=rf"{HOOK}/scripted-seed0, step 1: the gradient of w is not finite; .*'lr'"):
        state.advance({HOOK: torch.ones(2, 4)})
    assert torch.equal(sae.w, before)


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
def test_autocast_is_what_was_asked_for(scripted: Any, autocast: bool | None, dtype: torch.dtype) -> None:
    state, sae = scripted(autocast=autocast)
    state.advance({HOOK: torch.ones(2, 4)})
    assert sae.seen[0][1] == dtype
    assert sae.w.dtype == torch.float32


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("autocast", [False, True])
def test_every_architecture_learns_under_the_trainer(
    tmp_path: Path, reader: TensorReader, architecture: str, autocast: bool
) -> None:
    """Told by the mean error of the first and the last steps."""
    seen: list[float] = []
    config = TrainerConfig(
        architecture=architecture,
        expansion=4,
        batch_tokens=32,
        epochs=20,
        lr=5e-3,
        autocast=autocast,
        options={"k": 2} if "k" in ARCHITECTURES[architecture].Options.model_fields else {},
    )
    run = SaeRun(HOOK, config, OTHER if architecture.endswith("transcoder") else None)
    (sae,) = train_saes(reader, [run], tmp_path, on_step=lambda run, step, steps, stats: seen.append(stats.fvu))
    assert sum(seen[-20:]) < 0.7 * sum(seen[:20])
    assert all(torch.isfinite(t).all() for t in (sae.load().W_enc, sae.load().W_dec))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TrainerConfig(lr=1.0, warmup_fraction=0.1, decay_fraction=0.5)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10:51] == [1.0] * 41
    assert rates[51:] == [pytest.approx((100 - i) / 50) for i in range(51, 100)]
    cosine = dataclasses.replace(config, decay="cosine")
    curve = [learning_rate(step, 100, cosine) for step in range(100)]
    assert curve[:51] == rates[:51]
    assert curve[51:] == [pytest.approx((1 + math.cos(math.pi * (i - 50) / 50)) / 2) for i in range(51, 100)]
    for c in (config, cosine):
        assert all(0 < learning_rate(step, n, c) <= 1 for n in (1, 2, 3) for step in range(n))
    flat = TrainerConfig(lr=1.0, warmup_fraction=0.0, decay_fraction=0.0)
    assert {learning_rate(step, 9, flat) for step in range(9)} == {1.0}


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 150])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, data: Tensor, value: float, rows: int) -> None:
    broken = data.clone()
    broken[-rows:, 2] = value
    with pytest.raises(DataError, match=rf"{HOOK}.*NaN or infinity"):
        train_sae(broken, HOOK, tmp_path / "run", CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_is_refused_with_its_step(
    tmp_path: Path, reader: TensorReader, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reader.batches

    def broken(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(real(start), start):
            if step == 7:
                batch[OTHER][3, 1] = value
            yield batch

    monkeypatch.setattr(reader, "batches", broken)
    with pytest.raises(DataError, match=f"{OTHER}: the activations of step 7 hold NaN or infinity"):
        train_saes(reader, [SaeRun(OTHER, CONFIG)], tmp_path)


def test_less_than_one_batch_is_refused(tmp_path: Path, data: Tensor) -> None:
    with pytest.raises(DataError, match=f"31 activations at {HOOK} are fewer than one batch of 32"):
        train_sae(data[:31], HOOK, tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_outliers_are_left_out_and_the_rest_is_trained(tmp_path: Path, data: Tensor) -> None:
    outlier = 1000 * data[:1]
    mixed = torch.cat([data[:50], outlier, data[50:]])
    assert inliers(mixed).tolist() == [i != 50 for i in range(201)]
    found, _ = train_sae(mixed, HOOK, tmp_path / "mixed", CONFIG)
    expected, _ = train_sae(data, HOOK, tmp_path / "plain", CONFIG)
    assert_same_sae(found, expected)
    both = TensorReader({HOOK: data, OTHER: torch.cat([outlier, data[1:]])}, batch_tokens=32)
    assert both.tokens == 199  # a token is left out everywhere, or the rows would not match
    with pytest.raises(DataError, match="different numbers of rows"):
        TensorReader({HOOK: data, OTHER: data[1:]}, batch_tokens=32)


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        (SaeRun("blocks.9.hook_resid_post", CONFIG), "blocks.9.hook_resid_post' is not in the cache; it has blocks.0"),
        (SaeRun(HOOK, CONFIG, "blocks.9.hook_mlp_out"), "blocks.9.hook_mlp_out' is not in the cache"),
        (SaeRun(HOOK, dataclasses.replace(CONFIG, batch_tokens=31)), "field 'batch_tokens': 31 is not the reader's 32"),
        (SaeRun(HOOK, dataclasses.replace(CONFIG, architecture="topsy")), "'topsy' is not one of .*batch_topk"),
        (SaeRun(HOOK, dataclasses.replace(CONFIG, options={"k": 0})), r"field 'options\.k'"),
        (SaeRun(HOOK, dataclasses.replace(CONFIG, options={"kay": 3})), r"field 'options\.kay'"),
        (SaeRun(HOOK, dataclasses.replace(CONFIG, device="abacus")), "'device': 'abacus' cannot be used"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_by_field(
    tmp_path: Path, reader: TensorReader, run: SaeRun, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        train_saes(reader, [SaeRun(OTHER, CONFIG), run], tmp_path)
    assert not (tmp_path / "saes").exists()


def test_two_saes_of_one_name_are_refused(tmp_path: Path, reader: TensorReader) -> None:
    runs = [SaeRun(HOOK, CONFIG), SaeRun(HOOK, dataclasses.replace(CONFIG, lr=1e-4))]
    with pytest.raises(DataError, match="two SAEs have the name"):
        train_saes(reader, runs, tmp_path)


@pytest.mark.parametrize("name", ["../out", "a/../b", "/abs", "a//b", "white space", "a/."])
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot be the name of an SAE's folder"):
        SaeRun(HOOK, CONFIG, name=name)


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": math.nan}, {"epochs": 0}, {"clip_norm": 0.0}, {"betas": (0.9, 1.0)}, {"decay": "steep"}],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"'{next(iter(wrong))}'"):
        TrainerConfig(**wrong)


def test_a_folder_in_use_is_refused(tmp_path: Path, reader: TensorReader) -> None:
    def train_there(*_: Any) -> None:
        with pytest.raises(DataError, match="another process is training here"):
            train_saes(reader, [SaeRun(HOOK, CONFIG)], tmp_path)

    train_saes(reader, [SaeRun(HOOK, CONFIG)], tmp_path, on_step=train_there)


def test_ctrl_c_is_not_held_back_outside_of_a_training() -> None:
    from training.interruption import held_back

    with held_back() as came:
        assert not came()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)

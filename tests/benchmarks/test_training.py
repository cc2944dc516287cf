"""The training benchmark compares like with like: same batches, one evaluation, honest ratios, sums that add up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import costs, harvesting, peers, tables, trainers, training, training_tables
from benchmarks.peers import ARMS, HOOK_NAME, PACKAGES, Family, Setting
from benchmarks.results import Figure, Result, describe_machine, write_result
from feature_bank.errors import DataError
from feature_bank.sae import SAE
from training.corpus import Document, split_of

ROOT = Path(__file__).parents[2]
TINY = Setting(
    d_in=8, d_sae=24, k=3, batch_tokens=32, steps=40, lr=1e-2, warmup_steps=4, decay_steps=12, dead_after_tokens=640
)


def rows(n: int = 512, d_in: int = 8, *, seed: int = 0) -> Tensor:
    """Sparse sums of directions around a mean that is not zero, at a scale far from one."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, d_in, generator=torch.Generator().manual_seed(1))
    acts = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.12)
    return 7.0 * (acts @ directions) + 3.0


class RecordingArm:
    """Learns nothing and remembers what it was given."""

    def __init__(self, setting: Setting, quality: float = 1.0) -> None:
        self.setting, self.quality = setting, quality
        self.seen: list[Tensor] = []

    def step(self, batch: Tensor) -> None:
        self.seen.append(batch)

    def export(self) -> SAE:
        generator = torch.Generator().manual_seed(0)
        W_dec = torch.randn(self.setting.d_sae, self.setting.d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        return SAE(
            W_enc=self.quality * W_dec.T.contiguous(),
            W_dec=W_dec,
            b_enc=torch.zeros(self.setting.d_sae),
            b_dec=torch.full((self.setting.d_in,), 3.0),
            threshold=torch.ones(self.setting.d_sae),
            hook_name=HOOK_NAME,
        )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, RecordingArm]:
    """All arms are recording ones, by name."""
    made: dict[str, RecordingArm] = {}

    def create(arm: str, setting: Setting, sample: Tensor) -> RecordingArm:
        made[arm] = RecordingArm(setting)
        return made[arm]

    monkeypatch.setattr(peers, "create", create)
    return made


# ---- the same for all --------------------------------------------------------------------------------------


def test_every_arm_gets_the_same_batches_in_the_same_order(recorded: dict[str, RecordingArm]) -> None:
    speeds = trainers.measure_speed(rows(), TINY, list(ARMS), 3)
    assert set(speeds) == set(recorded) == set(ARMS)
    first, *others = recorded.values()
    assert len(first.seen) == 4 * trainers.STEPS_A_ROUND  # three rounds, and one that is not timed
    for other in others:
        assert len(other.seen) == len(first.seen)
        assert all(torch.equal(a, b) for a, b in zip(first.seen, other.seen, strict=True))
    assert len({tuple(batch.flatten()[:4].tolist()) for batch in first.seen}) == len(first.seen)


def test_every_arm_trains_for_all_steps_of_its_schedule(recorded: dict[str, RecordingArm]) -> None:
    found = trainers.measure_quality(rows(), rows(64, seed=5), TINY, list(ARMS), [1e-3, 1e-2], 1500)
    for name, arm in recorded.items():
        assert len(arm.seen) == arm.setting.steps == 44
        assert set(found[name]) == {"0.001", "0.01"}


@pytest.mark.parametrize("tokens", [1, 1000, 10_000, 123_456])
def test_a_schedule_fits_its_steps(tokens: int) -> None:
    setting = trainers.schedule(TINY, tokens, 3e-4)
    assert setting.lr == 3e-4
    assert setting.steps % trainers.STEPS_A_ROUND == 0
    assert setting.warmup_steps + setting.decay_steps <= setting.steps
    rates = [setting.rate(step) for step in range(setting.steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(1 / setting.decay_steps)


def test_our_arm_follows_the_common_schedule() -> None:
    from training.runs import TrainerConfig, learning_rate

    config = TrainerConfig(lr=1.0, warmup_fraction=4 / 40, decay_fraction=12 / 40)
    for step in range(40):
        assert learning_rate(step, 40, config) == pytest.approx(TINY.rate(step))


# ---- the arms ----------------------------------------------------------------------------------------------


def test_every_kind_that_a_peer_has_is_compared_with_ours() -> None:
    ours = {family for library, _, family in ARMS.values() if library == "sailguard"}
    assert ours == {"topk", "batchtopk"}
    assert {library for library, _, _ in ARMS.values()} == {"sailguard", *PACKAGES}
    assert training.arm_names([]) == ["sailguard_topk", "sailguard_batchtopk"]
    assert training.arm_names(list(PACKAGES)) == list(ARMS)
    with pytest.raises(ValueError, match="torchlens"):
        training.arm_names(["torchlens"])


def test_a_peer_that_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def create(*_: Any) -> None:
            raise ModuleNotFoundError("No module named 'sparsify'")

    monkeypatch.setattr(peers, "import_module", lambda name: Module)
    with pytest.raises(peers.PeerMissingError, match=r"eai-sparsify .*requirements-peers\.txt"):
        peers.create("sparsify_topk", TINY, rows())


@pytest.mark.parametrize("arm", list(ARMS))
@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_an_arm_learns_and_exports_in_the_units_of_its_input(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, _, family = ARMS[arm]
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # it is read when the next line imports sparsify
    if library != "sailguard":
        pytest.importorskip(library, exc_type=ImportError)
    setting = replace(TINY, steps=120)
    batches = trainers.Batches(rows(2048), setting, 1)
    made = peers.create(arm, setting, batches.sample())
    for number in range(setting.steps):
        (batch,) = batches.round(number)
        before = batch.clone()
        made.step(batch)
        assert torch.equal(batch, before)  # an arm that writes into its batch would change the next arm's
    quality = evaluate(made.export(), family)
    assert quality.fvu < 0.5
    assert quality.l0 <= TINY.k


def evaluate(sae: SAE, family: Family, data: Tensor | None = None) -> trainers.Quality:
    data = rows(512, seed=9) if data is None else data
    return trainers.evaluate(sae, data, family=family, k=TINY.k, batch_tokens=64)


# ---- evaluation --------------------------------------------------------------------------------------------


def test_exactly_k_features_are_active_whatever_the_threshold() -> None:
    sae = RecordingArm(TINY).export()
    x = rows(256) * 5
    for family in ("topk", "batchtopk"):
        low, high = (evaluate(replace(sae, threshold=torch.full((24,), t)), family, x) for t in (0.01, 5.0))
        assert (low.fvu, low.l0) == (high.fvu, high.l0)
        assert low.l0 == pytest.approx(TINY.k, abs=0.2)
    assert low.threshold_l0 is not None
    assert high.threshold_l0 is not None
    assert low.threshold_l0 > high.threshold_l0


def test_a_perfect_dictionary_explains_everything_and_an_empty_one_nothing() -> None:
    x = rows(300)
    identity = SAE(
        W_enc=torch.cat([torch.eye(8), -torch.eye(8)], dim=1),
        W_dec=torch.cat([torch.eye(8), -torch.eye(8)]),
        b_enc=torch.zeros(16),
        b_dec=x.mean(0),
        threshold=torch.zeros(16),
        hook_name=HOOK_NAME,
    )
    for family in ("topk", "batchtopk"):
        whole = trainers.evaluate(identity, x, family=family, k=8, batch_tokens=100)
        nothing = trainers.evaluate(
            replace(identity, W_enc=torch.zeros(8, 16)), x, family=family, k=8, batch_tokens=100
        )
        assert whole.fvu == pytest.approx(0, abs=1e-6)
        assert nothing.fvu == pytest.approx(1)
        assert (nothing.l0, nothing.unused) == (0, 1)


def test_topk_is_evaluated_row_by_row() -> None:
    sae, x = RecordingArm(TINY).export(), rows(96)
    whole = evaluate(sae, "topk", x)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert evaluate(sae, "topk", x[order]).fvu == pytest.approx(whole.fvu, rel=1e-5)


# ---- ratios ------------------------------------------------------------------------------------------------


def test_a_ratio_is_ours_over_the_faster_form_of_a_library() -> None:
    speeds = {
        "sailguard_topk": [300.0, 600.0],
        "sae_lens_topk": [100.0, 200.0],
        "sae_lens_sparse_topk": [150.0, 300.0],
        "sparsify_topk": [250.0, 500.0],
    }
    found = trainers.speed_ratios(speeds)
    assert found.keys() == {"topk_vs_sae_lens", "topk_vs_sparsify"}
    assert found["topk_vs_sae_lens"]["median"] == pytest.approx(2.0)
    assert found["topk_vs_sae_lens"]["arm"] == "sae_lens_sparse_topk"
    assert found["topk_vs_sparsify"]["median"] == pytest.approx(1.2)


def test_quality_is_compared_within_a_kind_with_the_best_peer_at_its_best_rate() -> None:
    def at(*values: float) -> dict[str, dict[str, float]]:
        return {str(lr): {"fvu": fvu} for lr, fvu in enumerate(values)}

    found = trainers.quality_ratios(
        {
            "sailguard_topk": at(0.30, 0.20),
            "sae_lens_topk": at(0.25, 0.40),
            "sparsify_topk": at(0.26, 0.24),
            "sailguard_batchtopk": at(0.10, 0.11),
            "sae_lens_batchtopk": at(0.20, 0.20),
        }
    )
    assert found["topk"]["best"] == "sparsify_topk"
    assert found["topk"]["value"] == pytest.approx(0.20 / 0.24)
    assert found["batchtopk"]["value"] == pytest.approx(0.5)


# ---- text and harvest --------------------------------------------------------------------------------------


def document(number: int) -> Document:
    name = f"row-{number}"
    return Document(
        id=name,
        text=f"text {number}",
        role="passage",
        domains=frozenset(),
        known=frozenset(),
        source="t",
        licence="t",
        split=split_of(name),
    )


def test_held_out_rows_are_of_other_documents_and_budgets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from training.corpus import TokenSequence

    def tokenise(documents: list[Document], tokenizer: Any, *, max_tokens: int) -> list[TokenSequence]:
        return [
            TokenSequence(document=index, ids=[int(d.id.split("-")[1])] * 10, positions=np.arange(10))
            for index, d in enumerate(documents)
        ]

    monkeypatch.setattr(harvesting, "tokenise", tokenise)
    documents = [document(number) for number in range(1000)]
    train, held_out = harvesting.sequences_of(documents, None, 5000)
    assert sum(len(s.positions) for s in train) == 5000
    assert sum(len(s.positions) for s in held_out) == 500
    splits = {int(d.id.split("-")[1]): d.split for d in documents}
    assert {splits[s.ids[0]] == "test" for s in train} == {False}
    assert {splits[s.ids[0]] == "test" for s in held_out} == {True}
    assert len({s.document for s in train}) == len(train)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="jsonl"):
        harvesting.read_text(tmp_path)


class Toy(nn.Module):
    """A base model of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        self.model.norm = nn.LayerNorm(2)

    def forward(self, **batch: Any) -> None:
        pass


def test_a_truncated_model_is_whole_again_afterwards() -> None:
    model = Toy()
    layers, norm = model.model.layers, model.model.norm

    def cut() -> None:
        with harvesting.truncated(model, layers=2) as base:
            assert len(base.layers) == 2  # type: ignore[arg-type]
            assert base.layers[1] is layers[1]  # type: ignore[index]
            raise KeyError

    with pytest.raises(KeyError):
        cut()
    assert model.model.layers is layers
    assert model.model.norm is norm


def test_the_bare_model_runs_over_the_batches_of_the_harvest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Toy()
    seen: list[dict[str, Any]] = []

    def harvest(model: nn.Module, sequences: Any, hooks: Any, folder: Path, **_: Any) -> None:
        folder.mkdir()
        for batch in ({"input_ids": 1}, {"input_ids": 2}):
            model(**batch)

    monkeypatch.setattr(harvesting, "harvest", harvest)
    bench = harvesting.HarvestBench(model, [], tmp_path / "timed")
    arms = bench.arms()
    assert bench.batches == [{"input_ids": 1}, {"input_ids": 2}]
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    arms["full_with_head"]()
    assert seen == bench.batches
    arms["harvest"]()
    assert len(bench.batches) == 2  # only the first pass was recorded
    assert not (tmp_path / "timed").exists()


# ---- costs -------------------------------------------------------------------------------------------------


def planned(**more: Any) -> dict[str, Any]:
    return costs.plan(
        costs.QWEN_PLAN,
        harvest_rate=1000.0,
        train_rate=4000.0,
        measured_model=costs.SMOLLM2,
        measured_layers=15,
        measured_context=100,
        measured_sae=costs.SaeShape(d_in=576, d_sae=4608, k=32, batch_tokens=2048),
        **more,
    )


def test_the_shapes_have_the_published_numbers_of_parameters() -> None:
    assert costs.QWEN_3B.layers * costs.QWEN_3B.layer_parameters == pytest.approx(2.77e9, rel=0.01)
    assert costs.SMOLLM2.layers * costs.SMOLLM2.layer_parameters + 49_152 * 576 == pytest.approx(134.5e6, rel=0.01)


def test_a_job_that_was_measured_costs_what_was_measured() -> None:
    sae = costs.SaeShape(d_in=576, d_sae=4608, k=32, batch_tokens=2048)
    job = costs.Job(model=costs.SMOLLM2, hook_layers=(14,), sae=sae, tokens=3.6e6, context=100, model_batch_tokens=2048)
    found = costs.plan(
        job,
        harvest_rate=1000.0,
        train_rate=4000.0,
        measured_model=costs.SMOLLM2,
        measured_layers=15,
        measured_context=100,
        measured_sae=sae,
    )
    assert found["cpu_hours"] == {
        "harvest": pytest.approx(1.0),
        "train": pytest.approx(0.25),
        "total": pytest.approx(1.25),
    }


def test_no_floor_is_above_what_is_counted() -> None:
    sae = costs.QWEN_PLAN.sae
    assert sae.floor_operations < sae.operations
    for device in costs.DEVICES:
        floor = costs.device_floor(sae, operations=device.operations, bandwidth=device.bandwidth)
        assert floor["floor"] == min(floor["arithmetic"], floor["memory"])
        seconds = costs.floor_seconds(sae.floor_operations, sae.floor_bytes, device)
        assert 1 / seconds == pytest.approx(floor["floor"])


def test_a_plan_scales_with_tokens_and_counts_every_hook_point() -> None:
    one = planned()
    assert one["bytes"]["cache"] == pytest.approx(1e9 * 5 * 2048 * 2, rel=0.01)
    assert one["gpu_train_hours_measured"] is None
    assert planned(gpu_train_rate=1e6)["gpu_train_hours_measured"] == pytest.approx(5e9 / 1e6 / 3600)
    for device in one["devices"].values():
        assert device["assumed_hours"]["total"] > device["floor_hours"]["total"] > 0
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(planned()))


# ---- the command and its tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--parts", "sleep"], ["--peers", "nobody"], ["--tokens", "-1"]])
def test_arguments_out_of_range_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.fixture
def finished(recorded: dict[str, RecordingArm], monkeypatch: pytest.MonkeyPatch) -> Callable[..., training.Benchmark]:
    """A benchmark on tiny data whose arms do nothing and whose harvest takes a second a pass."""

    class Timed:
        tokens = 1200

        def __init__(self, *_: Any) -> None:
            pass

        def arms(self) -> dict[str, Callable[[], float]]:
            names = ("harvest", "bare_truncated", "full", "full_with_head")
            return {name: lambda: 1.0 for name in names}

    class Sequence:
        ids = (0,) * 100

    def run(parts: list[str]) -> training.Benchmark:
        bench = object.__new__(training.Benchmark)
        bench.options = argparse.Namespace(
            repeats=2, tokens=200, lrs=[1e-3], harvest_tokens=500, harvest_repeats=2, parts=parts
        )
        bench.names = list(ARMS)
        bench.figures, bench.detail = {}, {"data": {"train_rows": 512, "held_out_rows": 64}}
        bench.model, bench.work, bench.sequences = None, Path(), [Sequence()] * 20
        bench.rows, bench.held_out = rows(), rows(64, seed=3)
        bench.run()
        bench.detail["threads"] = 2
        return bench

    monkeypatch.setattr(training, "DEFAULT", TINY)
    monkeypatch.setattr(training, "HarvestBench", Timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return run


def test_a_whole_run_has_every_figure_that_is_compared_over_time(
    finished: Callable[..., training.Benchmark], tmp_path: Path
) -> None:
    bench = finished(list(training.PARTS))
    assert bench.figures.keys() >= {
        "topk_vs_sae_lens",
        "batchtopk_vs_sae_lens",
        "topk_vs_dictionary_learning",
        "batchtopk_vs_dictionary_learning",
        "topk_vs_sparsify",
        "fvu_vs_best",
        "fvu_vs_best_topk",
        "fvu_vs_best_batchtopk",
        "harvest_vs_bare_truncated",
        "harvest_vs_full",
    }
    assert bench.figures["fvu_vs_best"].value == pytest.approx(1.0)  # all arms gave the same SAE
    assert bench.figures["harvest_vs_full"] == Figure(value=1.0, unit="ratio", n=2)
    write_result("training", bench.figures, bench.detail, folder=tmp_path)


def test_the_tables_show_every_arm_and_every_device(
    finished: Callable[..., training.Benchmark], tmp_path: Path
) -> None:
    bench = finished(list(training.PARTS))
    path = write_result("training", bench.figures, bench.detail, folder=tmp_path)
    _, text = tables.page("training", path.parent)
    for arm in ARMS:
        assert text.count(training_tables.arm_title(arm)) >= 1
    for device in costs.DEVICES:
        assert device.name in text
    assert "nan" not in text.lower().split("<!-- begin training")[1]


def test_a_part_of_the_benchmark_has_tables_as_well(
    finished: Callable[..., training.Benchmark], tmp_path: Path
) -> None:
    for part in ("speed", "quality", "harvest"):
        bench = finished([part])
        path = write_result("training", bench.figures, bench.detail, folder=tmp_path)
        _, text = tables.page("training", path.parent)
        assert "a larger model" not in text.split("BEGIN training")[1].split("END training")[0]


def test_an_accelerators_rates_are_shown_beside_its_floor() -> None:
    sae = costs.SaeShape(d_in=16, d_sae=64, k=4, batch_tokens=32)
    spread = {"median": 10.0, "quartiles": [9.0, 11.0], "n": 3}
    one = {
        "tokens_per_s": {"sailguard_topk": spread, "sae_lens_topk": spread},
        "floor_tokens_per_s": costs.device_floor(sae, operations=1e12, bandwidth=1e11),
    }
    detail = {
        "threads": 2,
        "cuda": {"shape": {"d_in": 16, "d_sae": 64, "k": 4, "batch_tokens": 32}, "float32": one, "bfloat16": one},
    }
    result = Result(
        name="training",
        date="2026-01-01",
        machine=describe_machine().model_copy(update={"gpu": "Some GPU"}),
        versions={"torch": "2"},
        figures={"x": Figure(value=1.0, unit="ratio")},
        detail=detail,
    )
    text = training_tables.training_tables(result)
    assert "Some GPU" in text
    assert text.count("memory allows") == 2


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_the_peers_are_pinned_exactly_and_agree_with_the_projects_own_pins() -> None:
    theirs, own = pins(ROOT / peers.REQUIREMENTS), pins(ROOT / "constraints.txt")
    assert set(PACKAGES.values()) <= theirs.keys()
    assert {name: version for name, version in theirs.items() if own.get(name, version) != version} == {}
    assert "torch" not in theirs

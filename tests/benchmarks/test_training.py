"""The training benchmark as a command: it refuses what is out of range, and a run has every figure and every table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import costs, tables, training, training_tables
from benchmarks.peers import ARMS
from benchmarks.results import Figure, Result, describe_machine, write_result
from tests.benchmarks.tiny_training import TINY, RecordingArm, rows


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

"""The curve is of growing parts of one corpus, and the ratios are of one round each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cost_curve import Cost, cost_curve, preset_runs
from tests.training.samples import TOY_HOOKS, LlamaForCausalLM, toy_sequences
from training.runs import SaeRun, TrainerConfig


def test_the_curve_is_of_a_sixteenth_a_quarter_and_all(tmp_path: Path) -> None:
    config = TrainerConfig(expansion=2, batch_tokens=16, options={"k": 2})
    sequences = toy_sequences(64)
    found = cost_curve(
        LlamaForCausalLM(), sequences, [SaeRun(TOY_HOOKS[0], config, name="sae")], tmp_path, lambda _: None
    )
    tokens = [sum(len(s.positions) for s in sequences[:count]) for count in (4, 16, 64)]
    assert [cost.tokens for cost in found] == tokens
    assert [cost.bytes for cost in found] == sorted(cost.bytes for cost in found)
    assert not list(tmp_path.iterdir())


def test_the_runs_are_those_of_the_preset() -> None:
    runs = preset_runs()
    assert [run.hook_name for run in runs] == [f"blocks.{layer}.hook_resid_post" for layer in (6, 14, 22)]
    assert {run.config.options["k"] for run in runs} == {32}


def test_figures_are_medians_of_rounds_and_costs_a_token() -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from benchmarks.scale import ARMS, curve_figures, figures_of

    rates = {
        "here_1_core": [10.0, 12.0, 11.0],
        "here_2_cores": [15.0, 15.0, 9.0],
        "ray_1_worker": [10.0, 10.0, 10.0],
        "ray_1_worker_1_core": [8.0, 10.0, 10.0],
        "ray_2_workers": [20.0, 15.0, 18.0],
    }
    assert rates.keys() == ARMS.keys()
    found = figures_of(rates)
    assert found["ray_overhead"].value == 1.1
    assert found["ray_overhead_1_core"].value == 1.2
    assert found["ray_overhead_2_cores"].value == 0.75
    assert found["harvest_2_workers_vs_1"].value == 1.8
    curve = curve_figures([Cost(100, 10.0, 1.0, 400), Cost(400, 20.0, 8.0, 800), Cost(1600, 80.0, 16.0, 3200)])
    assert curve["harvest_cost_per_token_16x_vs_1x"].value == 0.5
    assert curve["train_cost_per_token_16x_vs_1x"].value == 1.0
    assert curve["bytes_per_token"].value == 2.0

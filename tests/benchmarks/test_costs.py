"""Costs add up: a measured job costs what was measured, no floor is above what is counted, plans scale with tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import costs


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

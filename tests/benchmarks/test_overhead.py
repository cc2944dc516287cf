"""The benchmark of the guard's cost: fair turns, ratios within a round, and arms that generate what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import overhead


def test_a_steady_drift_costs_every_arm_the_same() -> None:
    clock = iter(range(1000))
    arms = {name: lambda: float(next(clock)) for name in ("plain", "guarded", "full_sae")}
    measured = overhead.interleaved(arms, 4)
    assert len({sum(values) for values in measured.values()}) == 1


def test_every_arm_follows_every_other_alike() -> None:
    calls: list[str] = []
    names = ("plain", "again", "guarded")
    overhead.interleaved({name: lambda name=name: float(calls.append(name) or 0) for name in names}, 6)
    rounds = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    for name in names:
        assert sorted(order.index(name) for order in rounds) == [0, 0, 1, 1, 2, 2]


def test_a_ratio_is_taken_within_a_round() -> None:
    assert overhead.ratios({"plain": [1.0, 10.0], "guarded": [2.0, 30.0]}, "plain") == {"guarded": [2.0, 3.0]}


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    found = overhead.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    low, high = found.pop("interval")
    assert found == {"median": 3.0, "quartiles": [2.0, 4.0], "n": 5}
    assert 1.0 <= low <= 3.0 <= high <= 5.0
    assert overhead.spread([2.0] * 9)["interval"] == [2.0, 2.0]


def test_nested_time_is_counted_once_unless_it_has_its_own_label(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = overhead.Stopwatch()
    inner = watch.wrap("hooks", lambda: None)
    last = watch.wrap("flush", inner, nested=True)
    watch.wrap("finish", last)()
    assert watch.seconds == {"flush": 1, "finish": 3}
    inner()
    assert watch.seconds == {"flush": 1, "finish": 3, "hooks": 1}


def test_timing_an_engine_leaves_it_as_it_was() -> None:
    from guard.engines.transformers import TransformersEngine

    before = dict(vars(TransformersEngine))
    with overhead.timed_engine(overhead.Stopwatch()):
        assert vars(TransformersEngine)["_at_hook"] is not before["_at_hook"]
    assert dict(vars(TransformersEngine)) == before


def test_steps_generate_what_the_model_generates(tiny_model: Any, tiny_tokenizer: Any) -> None:
    inputs = tiny_tokenizer(["a small bird", "rain"], padding=True, return_tensors="pt")
    end = tiny_tokenizer.eos_token_id
    decoding = overhead.Decoding(tiny_model, inputs, [end])
    for _ in range(5):
        assert decoding.step() > 0
    expected = tiny_model.generate(**inputs, min_new_tokens=6, max_new_tokens=6, do_sample=False, pad_token_id=end)
    assert torch.cat(decoding.tokens, dim=1).tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()

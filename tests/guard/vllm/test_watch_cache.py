"""A prompt whose beginning the engine did not compute again is judged by what was read there before, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from guard.engines.judging import Judging
from guard.engines.vllm.watch import ActsCache, Slots, Watch
from tests.factories import make_policy
from tests.guard.conftest import VARIED
from tests.guard.generation import BLOCK, FLAG_ALL, assert_same_report
from tests.guard.vllm.conftest import BLOCK_SIZE, Engine, MakeJudging, Text, alone

Texts = dict[str, Text]
SHARED = 16  # tokens that a and b begin with
APART = {"a": range(20), "b": [*range(4), *range(20, 40)], "c": range(40, 60)}
"""Each request's blocks: b has its first four from a."""


@pytest.fixture
def judging(judging_of: MakeJudging) -> Judging:
    return judging_of(make_policy(*FLAG_ALL), **VARIED)


def cached_engine(judging: Judging, texts: Texts, blocks: Mapping[str, Sequence[int]] = APART) -> Engine:
    cache = ActsCache(60 * BLOCK_SIZE, judging.monitor.encoder.n_features)
    return Engine(Watch({"": judging}, cache), texts, blocks)


def judged_prompts(judging: Judging, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The activations by which each request's prompt is judged."""
    found: dict[str, torch.Tensor] = {}
    judge = judging.judge_prompt_acts

    def keep(state: Any, row: int, ids: Any, acts: torch.Tensor) -> Any:
        found[state.request_ids[row]] = acts.clone()
        return judge(state, row, ids, acts)

    monkeypatch.setattr(judging, "judge_prompt_acts", keep)
    return found


def test_a_cached_beginning_is_judged_as_the_one_that_was_computed(
    judging: Judging, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = judged_prompts(judging, monkeypatch)
    engine = cached_engine(judging, texts)
    engine.join("a")
    engine.run(7)
    engine.watch.leave(["a"])
    engine.join("b", cached=SHARED)
    engine.run(3)
    assert torch.equal(prompts["b"][:SHARED], prompts["a"][:SHARED])
    assert_same_report(engine.report("b"), alone(judging, texts["b"]))
    assert engine.errors == {}


def test_the_same_prompt_again_gets_the_same_scores_to_the_bit(judging: Judging, texts: Texts) -> None:
    engine = cached_engine(judging, {"a": texts["a"], "b": texts["a"]})
    engine.join("a")
    engine.step({"a": SHARED})
    engine.run()
    engine.join("b", cached=SHARED)
    engine.run()
    a, b = engine.report("a"), engine.report("b")
    assert (a.prompt_scores, a.response_scores) == (b.prompt_scores, b.response_scores)


def test_a_beginning_that_is_computed_in_the_very_same_pass_is_judged_too(judging: Judging, texts: Texts) -> None:
    """vLLM enters a block into its prefix cache when it is scheduled, so that two new requests may share one."""
    for order in (("a", "b"), ("b", "a")):
        engine = cached_engine(judging, texts)
        assert engine.watch._cache is not None
        engine.watch._cache._acts.fill(3.0)  # what other requests left there
        engine.join("a")
        engine.join("b", cached=SHARED)
        engine.step({name: engine.left(name) for name in order})
        engine.run()
        assert engine.errors == {}
        for name in order:
            assert_same_report(engine.report(name), alone(judging, texts[name]))


def test_a_beginning_that_was_cached_in_a_pass_that_failed_is_not_taken_for_read(
    judging: Judging, texts: Texts
) -> None:
    """The engine keeps the keys and values of a pass that the guard could not judge, and hands them on."""
    engine = cached_engine(judging, texts)
    assert engine.watch._cache is not None
    engine.watch._cache._acts.fill(0.0)  # fresh pages of the host's memory
    engine.join("a", "c")
    engine.watch._requests.pop("c")  # an internal error
    engine.step({"c": 4, "a": SHARED})
    assert engine.errors == {"block": 1}
    engine.join("b", cached=SHARED)
    while "b" in engine.running:
        engine.step({"b": engine.left("b")})
    if not engine.told["b"].report["failed"]:
        assert_same_report(engine.report("b"), alone(judging, texts["b"]))


def test_answers_in_the_cache_are_the_beginning_of_the_next_prompt(judging: Judging, texts: Texts) -> None:
    """A conversation goes on: the second prompt holds the first one and its answer."""
    first = texts["a"]
    second = first._replace(prompt=first.prompt + 12)
    engine = cached_engine(judging, {"a": first, "b": second}, {"a": APART["a"], "b": [*range(8), *range(20, 40)]})
    engine.join("a")
    engine.run(9)
    engine.watch.leave(["a"])
    engine.join("b", cached=8 * BLOCK_SIZE - BLOCK_SIZE)
    engine.run(2)
    assert_same_report(engine.report("b"), alone(judging, second))


def test_a_preempted_prompt_goes_on_where_the_cache_ends(judging: Judging, texts: Texts) -> None:
    engine = cached_engine(judging, texts)
    engine.join("a")
    engine.run()
    engine.join("b")
    engine.step({"b": 5})
    engine.at["b"] = SHARED  # preempted, and found in the cache when it came back
    engine.run(4)
    assert_same_report(engine.report("b"), alone(judging, texts["b"]))


def test_a_slot_that_is_written_again_holds_what_came_last(judging: Judging, texts: Texts) -> None:
    engine = cached_engine(judging, texts, {"c": APART["a"], "a": APART["a"], "b": APART["b"]})
    for name in ("c", "a"):
        engine.join(name)
        engine.run(6)
        engine.watch.leave([name])
    engine.join("b", cached=SHARED)
    engine.run(6)
    assert_same_report(engine.report("b"), alone(judging, texts["b"]))


def test_slots_are_found_across_blocks() -> None:
    slots = Slots(np.arange(3), [[5, 2, 9], [1, 0, 0]], 4)
    assert slots.of(0, 2, 10).tolist() == [22, 23, 8, 9, 10, 11, 36, 37]
    assert slots.of(1, 0, 2).tolist() == [4, 5]


def test_without_a_cache_a_gap_is_an_error(judging_of: MakeJudging, texts: Texts) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(BLOCK), violence=False)}), texts)
    assert not engine.watch.caches
    engine.join("b", cached=SHARED)
    engine.run()
    assert engine.blocked == ["b"]
    assert engine.told["b"].report["failed"]
    assert engine.report("b").action == "block"
    assert engine.told["b"].report["refusal"] == "REFUSED"


@pytest.mark.parametrize("beyond", [0, 1, 3])
def test_a_prompt_that_was_not_seen_to_its_end_is_never_passed_over(
    judging_of: MakeJudging, texts: Texts, beyond: int
) -> None:
    judging = judging_of(make_policy(BLOCK), violence=False)
    engine = cached_engine(judging, texts)
    engine.join("a", cached=texts["a"].prompt + beyond)
    engine.sampled["a"] = beyond + 1
    engine.step({"a": 1})
    assert engine.errors == {"block": 1}

"""When the guard itself fails, the policy says what becomes of the requests: by default they stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.engines.vllm.watch import Sampling, Watch
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED
from tests.guard.generation import BLOCK, FLAG_ALL, assert_same_report
from tests.guard.vllm.conftest import Engine, MakeJudging, Text, alone

Texts = dict[str, Text]
ACTIONS = {"block": "block", "flag": "flag", "allow": "allow"}


def broken(text: Text, at: int) -> Text:
    hidden = {hook: x.clone() for hook, x in text.hidden.items()}
    hidden[HOOKS[0]][at] = torch.nan
    return text._replace(hidden=hidden)


@pytest.mark.parametrize("place", ["prompt", "answer"])
@pytest.mark.parametrize("on_error", list(ACTIONS))
def test_activations_that_are_no_numbers_lead_to_what_the_policy_says(
    judging_of: MakeJudging, texts: Texts, on_error: str, place: str
) -> None:
    judging = judging_of(make_policy(BLOCK, on_error=on_error), violence=False)
    text = texts["a"]
    at = 4 if place == "prompt" else text.prompt + 1
    engine = Engine(Watch({"": judging}), {"a": broken(text, at)})
    engine.join("a")
    engine.run(6)
    report, told = engine.report("a"), engine.told["a"]
    assert report.action == told.report["action"] == ACTIONS[on_error]
    assert told.report["failed"]
    assert set(engine.errors) == {on_error}
    if on_error == "block":
        assert engine.errors == {"block": 1}
        assert engine.blocked == ["a"]
        assert told.report["refusal"] == "REFUSED"
        assert told.release == [0] * len(told.release)  # the hold had not passed
    else:
        assert told.report["refusal"] == ""
        assert told.release[-1] == text.limit - 1  # it goes on to its end


@pytest.mark.parametrize("on_error", ["flag", "allow"])
def test_a_request_with_a_gap_goes_on_if_the_policy_says_so(
    judging_of: MakeJudging, texts: Texts, on_error: str
) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(BLOCK, on_error=on_error), violence=False)}), texts)
    engine.join("b", cached=16)
    engine.run()
    assert engine.report("b").action == ACTIONS[on_error]
    assert engine.told["b"].report["failed"]
    assert engine.blocked == []
    assert engine.errors[on_error] > 0


def test_each_tenants_policy_says_what_follows_from_an_error_of_a_pass(judging_of: MakeJudging, texts: Texts) -> None:
    lanes = {
        "": judging_of(make_policy(BLOCK), violence=False),
        "lax": judging_of(make_policy(BLOCK, on_error="allow"), violence=False),
    }
    watch = Watch(lanes)
    engine = Engine(watch, texts)
    engine.join("a", "c")
    engine.join("d", tenant="lax")
    engine.step({"a": 5, "c": 5, "d": 5})
    watch.fail(RuntimeError("boom"), ["a", "c", "d", "not here"])
    engine.take(watch.take_news())
    assert engine.blocked == ["a", "c"]
    assert engine.errors == {"block": 1, "allow": 1}  # one error, whatever number of requests it met
    assert engine.running == ["d"]
    engine.run(4)
    assert engine.report("d").action == "allow"
    assert engine.told["d"].report["failed"]


def test_requests_of_passes_that_went_well_are_not_touched_by_a_failure(judging_of: MakeJudging, texts: Texts) -> None:
    judging = judging_of(make_policy(*FLAG_ALL), **VARIED)
    engine = Engine(Watch({"": judging}), {"a": broken(texts["a"], 2), "c": texts["c"]})
    engine.join("c")
    engine.step({"c": 10})
    engine.join("a")
    engine.step({"a": engine.left("a")})
    assert engine.blocked == ["a"]
    engine.run(4)
    assert not engine.told["c"].report["failed"]
    assert_same_report(engine.report("c"), alone(judging, texts["c"]))


def test_a_failure_of_the_last_judgement_counts_too(
    judging_of: MakeJudging, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging = judging_of(make_policy(BLOCK), violence=False)

    def fail(*args: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(judging.monitor, "finish", fail)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("a")
    engine.run()
    assert engine.report("a").action == "block"
    assert engine.blocked == ["a"]
    assert engine.errors == {"block": 1}


def test_tokens_that_were_generated_and_not_observed_are_an_error(judging_of: MakeJudging, texts: Texts) -> None:
    watch = Watch({"": judging_of(make_policy(BLOCK), violence=False)})
    engine = Engine(watch, texts)
    engine.join("a")
    engine.step({"a": engine.left("a")})
    watch.sampled(["a"], [[9]])  # a token that no pass reads
    watch.leave(["a"])
    engine.take(watch.take_news())
    assert engine.report("a").action == "block"
    assert engine.told["a"].report["failed"]


def test_a_request_that_goes_on_after_the_end_that_was_foreseen_is_an_error(
    judging_of: MakeJudging, texts: Texts
) -> None:
    text = texts["a"]
    watch = Watch({"": judging_of(make_policy(BLOCK, {**BLOCK, "name": "more"}), violence=False)})
    engine = Engine(watch, texts)
    engine.join("a")
    watch._requests["a"].sampling = Sampling(ends=frozenset(), limit=3)
    while "a" in engine.running:
        engine.step({"a": engine.left("a")})
    assert not engine.told["a"].report["failed"]
    engine.told["a"].report.clear()
    engine.running.append("a")
    engine.step({"a": 1})
    assert engine.errors == {"block": 1}
    assert engine.blocked == ["a"]
    assert engine.at["a"] == text.prompt + 3


def test_several_tokens_of_an_answer_in_one_pass_are_an_error(judging_of: MakeJudging, texts: Texts) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(BLOCK), violence=False)}), texts)
    engine.join("a", "c")
    engine.step({"a": engine.left("a"), "c": engine.left("c") - 1})
    engine.sampled["a"] += 1  # as speculative decoding would
    engine.step({"a": 2})
    assert engine.blocked == ["a"]
    engine.sampled["c"] += 1
    engine.step({"c": 2})  # the last of the prompt and the first of the answer
    assert engine.blocked == ["a", "c"]


@pytest.mark.parametrize("on_error", ["flag", "allow"])
def test_a_request_that_fails_takes_no_other_one_with_it_for_good(
    judging_of: MakeJudging, texts: Texts, on_error: str
) -> None:
    """What comes after the pass that failed is judged again, though the request that was at fault still runs."""
    rules = make_policy({"domain": "violence", "action": "block"}, on_error=on_error)
    engine = Engine(Watch({"": judging_of(rules, violence=True)}), texts)
    engine.join("b", cached=16)  # a gap: it can never be judged
    engine.step({"b": engine.left("b")})
    engine.join("a")
    for _ in range(texts["a"].limit):
        engine.step({name: engine.left(name) for name in engine.running})
        if "a" not in engine.running:
            break
    assert engine.report("a").action == "block"

"""The guard inside a real vLLM engine that runs eagerly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.core import Guard
from guard.models import load_model
from tests.guard.vllm.engine_fixtures import Start, actions, needs_vllm, start, tenants
from tests.guard.vllm.engine_process import EngineProcess
from tests.guard.vllm.engine_prompts import HARMLESS, LONG, POLITICS, TERROR, fixed_prompts

__all__ = ["start", "tenants"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
GREEDY = {"temperature": 0.0}
BATCH = [*HARMLESS[:9], TERROR, *HARMLESS[9:]]
TIE = 0.02  # a probability this near its threshold may fall on either side: the engines round differently


@pytest.fixture(scope="module")
def engine(start: Start, tenants: Path) -> Iterator[EngineProcess]:
    with start("eager", guard={"SAILGUARD_TENANTS": str(tenants)}, enforce_eager=True, block_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def unguarded(start: Start, engine: EngineProcess) -> list[list[int]]:
    """The tokens of an unguarded engine's answers to the batch."""
    with start("plain", guard=None, enforce_eager=True, block_size=32) as plain:
        return [answer["ids"] for (answer,) in plain.chat(BATCH, {**GREEDY, "max_tokens": 12, "ignore_eos": True})]


def test_of_32_concurrent_requests_only_the_harmful_one_is_flagged_and_the_others_get_their_own_answers(
    engine: EngineProcess, unguarded: list[list[int]]
) -> None:
    params = {**GREEDY, "max_tokens": 12, "ignore_eos": True}
    watched = {**params, "extra_args": {"sailguard_tenant": "lab"}}
    found = [answer for (answer,) in engine.chat(BATCH, watched)]

    assert [i for i, answer in enumerate(found) if answer["report"]["action"] != "allow"] == [BATCH.index(TERROR)]
    assert [answer["ids"] for answer in found] == unguarded
    for answer in found:
        assert answer["report"]["tokens_generated"] == answer["report"]["tokens_observed"] <= len(answer["ids"]) == 12


def test_a_blocked_request_ends_with_the_refusal_alone_and_the_others_go_on(engine: EngineProcess) -> None:
    found = [answer for (answer,) in engine.chat(BATCH, {**GREEDY, "max_tokens": 12})]
    blocked = found.pop(BATCH.index(TERROR))

    assert blocked["finish_reason"] == "content_filter"
    assert blocked["ids"] == []
    assert blocked["text"].startswith("I can't continue")
    assert blocked["report"]["action"] == "block"
    assert {answer["finish_reason"] for answer in found} <= {"stop", "length"}
    assert {answer["report"]["action"] for answer in found} == {"allow"}


def test_verdicts_are_those_of_the_transformers_engine_up_to_ties(engine: EngineProcess) -> None:
    prompts, loaded = fixed_prompts(50), load_model()
    theirs = [
        answer["report"]
        for (answer,) in engine.chat(prompts, {**GREEDY, "max_tokens": 4, "extra_args": {"sailguard_tenant": "lab"}})
    ]
    guard = Guard.from_bank(policy="monitor")
    with guard.attach(loaded.model, loaded.tokenizer) as attached:
        ours = [attached.chat([{"role": "user", "content": p}], max_new_tokens=1).report for p in prompts]
    thresholds = {d: guard.bank.heads[d].thresholds for d in guard.bank.heads}
    assert {action for report in theirs for action in actions(report, "prompt")}, "some prompts must be flagged"
    for prompt, got, expected in zip(prompts, theirs, ours, strict=True):
        wanted = actions(expected.to_dict(), "prompt")
        for domain, _ in actions(got, "prompt") ^ wanted:
            scores = got["prompt_scores"][domain], expected.prompt_scores[domain]
            near = [abs(s - t) < TIE for s in scores for t in thresholds[domain].values()]
            assert any(near), f"{prompt}: {domain} {scores}"


def test_a_prompt_from_the_prefix_cache_keeps_its_scores_to_the_bit(engine: EngineProcess) -> None:
    prompts = [f"{LONG} {POLITICS}"]
    params = {**GREEDY, "max_tokens": 8, "extra_args": {"sailguard_tenant": "lab"}}
    ((first,),) = engine.chat(prompts, params)
    ((second,),) = engine.chat(prompts, params)

    assert first["cached"] == 0
    assert second["cached"] >= 128
    assert second["report"]["prompt_scores"] == first["report"]["prompt_scores"]
    assert actions(second["report"], "prompt") == actions(first["report"], "prompt") != set()


def test_a_blocked_prompt_is_blocked_again_when_it_comes_from_the_cache(engine: EngineProcess) -> None:
    prompts = [" ".join([TERROR] * 6)]
    found = [engine.chat(prompts, {**GREEDY, "max_tokens": 8})[0][0] for _ in range(2)]

    assert [answer["finish_reason"] for answer in found] == ["content_filter"] * 2
    assert found[1]["cached"] > 0


def test_choices_of_one_request_are_judged_each_on_its_own(engine: EngineProcess) -> None:
    (answers,) = engine.chat([POLITICS], {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 10, "ignore_eos": True})

    assert len(answers) == 3
    assert len({answer["report"]["request_id"] for answer in answers}) == 3
    assert len({str(answer["report"]["response_scores"]) for answer in answers}) == 3
    assert all(answer["report"]["tokens_observed"] == 10 for answer in answers)


def test_exactly_the_positions_after_the_prompt_are_steered_decoding_included(engine: EngineProcess) -> None:
    engine.rpc("probe_record")
    params = {**GREEDY, "max_tokens": 9, "ignore_eos": True}
    given = [{**params, "extra_args": {"sailguard_tenant": "steered"}}, params]
    (steered,), (other,) = engine.chat([POLITICS, POLITICS], given)
    rows = engine.rpc("probe_steered")
    name = steered["report"]["request_id"]

    assert rows == [[name, steered["prompt"] + i] for i in range(9)]
    assert steered["report"]["action"] == "steer"
    assert steered["ids"] != other["ids"]


def test_requests_of_one_batch_bring_different_steering_and_leave_the_cache_to_the_others(
    engine: EngineProcess,
) -> None:
    prompt = f"Here is a story. {LONG} Now tell me about the weather."
    lab = {"sailguard_tenant": "lab"}
    asked = [lab, {**lab, "sailguard_steer": "politics=2"}, {**lab, "sailguard_steer": "violence=2"}]
    params = [{**GREEDY, "max_tokens": 8, "ignore_eos": True, "extra_args": args} for args in asked]
    (after,) = engine.chat([prompt], params[1])[0]
    plain, more_politics, more_violence = [answer for (answer,) in engine.chat([prompt] * 3, params)]

    assert plain["cached"] <= 32, "what was computed under steering is nobody else's, but the template's own beginning"
    assert len({str(answer["ids"]) for answer in (plain, more_politics, more_violence)}) == 3
    assert after["ids"] == more_politics["ids"]
    assert more_politics["report"]["response_scores"]["politics"] > plain["report"]["response_scores"]["politics"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"sailguard_tenant": "nobody"}, "'nobody' is not in the file"),
        ({"sailguard_steer": "politics=-1"}, "not allowed for this tenant"),
        ({"sailguard_tenant": "lab", "sailguard_steer": "weather=1"}, "weather=1"),
    ],
)
def test_what_a_request_may_not_ask_for_is_refused_before_it_runs(
    engine: EngineProcess, args: dict[str, str], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        engine.chat(["Hello"], {"max_tokens": 2, "extra_args": args})


def test_when_the_guard_fails_the_policy_decides(engine: EngineProcess, unguarded: list[list[int]]) -> None:
    params = {**GREEDY, "max_tokens": 12, "ignore_eos": True}
    engine.rpc("probe_break", True)
    try:
        ((closed,),) = engine.chat([HARMLESS[0]], params)
        ((passed,),) = engine.chat([HARMLESS[0]], {**params, "extra_args": {"sailguard_tenant": "open"}})
    finally:
        engine.rpc("probe_break", False)
    ((after,),) = engine.chat([HARMLESS[0]], params)

    assert (closed["finish_reason"], closed["ids"]) == ("content_filter", [])
    assert (passed["finish_reason"], len(passed["ids"])) == ("length", 12)
    assert (after["finish_reason"], after["report"]["action"]) == ("length", "allow")
    text = engine.ask(op="metrics")
    errors = {
        line.split("{")[1].split('"')[1]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("sailguard_errors_total{")
    }
    assert errors["block"] > 0
    assert errors["allow"] > 0


def test_a_pass_that_the_taps_did_not_see_is_an_error(engine: EngineProcess) -> None:
    engine.rpc("probe_cut", True)
    try:
        ((answer,),) = engine.chat([HARMLESS[1]], {**GREEDY, "max_tokens": 4})
    finally:
        engine.rpc("probe_cut", False)
    assert answer["finish_reason"] == "content_filter"


def test_metrics_count_every_token_that_was_generated(engine: EngineProcess) -> None:
    def counted() -> dict[str, float]:
        lines = [line for line in engine.ask(op="metrics").splitlines() if line.startswith("sailguard_tokens_")]
        return {line.split()[0]: float(line.split()[1]) for line in lines}

    before = counted()
    engine.chat(list(HARMLESS[:5]), {**GREEDY, "max_tokens": 7, "ignore_eos": True})
    after = counted()
    for name in ("sailguard_tokens_generated_total", "sailguard_tokens_observed_total"):
        assert after[name] - before[name] == 35

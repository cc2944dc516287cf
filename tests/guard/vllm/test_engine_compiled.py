"""The guard inside a real vLLM engine that compiles the model: what hooks would silently miss.

In float32: fusing across the place of a tap, the compiler leaves out roundings that bfloat16 shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guard.vllm.engine_fixtures import Start, actions, needs_vllm, start, tenants
from tests.guard.vllm.engine_process import EngineProcess
from tests.guard.vllm.engine_prompts import HARMLESS, POLITICS, TERROR

__all__ = ["start", "tenants"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
BATCH = [*HARMLESS[:9], TERROR, *HARMLESS[9:]]


@pytest.fixture(scope="module")
def unguarded(start: Start) -> list[list[int]]:
    """The tokens of an unguarded engine's answers to the batch. It comes first: the guarded engine must not run from
    the graphs that it leaves in vLLM's cache."""
    with start("plain", guard=None, dtype="float32") as plain:
        return [answer["ids"] for (answer,) in plain.chat(BATCH, GREEDY)]


@pytest.fixture(scope="module")
def engine(start: Start, tenants: Path, unguarded: list[list[int]]) -> Iterator[EngineProcess]:
    with start("compiled", guard={"SAILGUARD_TENANTS": str(tenants)}, dtype="float32") as engine:
        yield engine


def test_of_32_concurrent_requests_only_the_harmful_one_is_flagged_and_the_others_get_their_own_answers(
    engine: EngineProcess, unguarded: list[list[int]]
) -> None:
    watched = {**GREEDY, "extra_args": {"sailguard_tenant": "lab"}}
    found = [answer for (answer,) in engine.chat(BATCH, watched)]

    assert [i for i, answer in enumerate(found) if answer["report"]["action"] != "allow"] == [BATCH.index(TERROR)]
    assert [answer["ids"] for answer in found] == unguarded
    for answer in found:
        assert answer["report"]["tokens_generated"] == answer["report"]["tokens_observed"] <= len(answer["ids"]) == 12


def test_a_blocked_request_ends_with_the_refusal_alone(engine: EngineProcess) -> None:
    ((answer,),) = engine.chat([TERROR], GREEDY)
    assert (answer["finish_reason"], answer["ids"]) == ("content_filter", [])
    assert ("terror", "block") in actions(answer["report"], "prompt")


def test_exactly_the_positions_after_the_prompt_are_steered_decoding_included(engine: EngineProcess) -> None:
    engine.rpc("probe_record")
    steering = {**GREEDY, "extra_args": {"sailguard_tenant": "steered"}}
    (steered,), (other,) = engine.chat([POLITICS, POLITICS], [steering, GREEDY])

    name = steered["report"]["request_id"]
    assert engine.rpc("probe_steered") == [[name, steered["prompt"] + i] for i in range(12)]
    assert steered["ids"] != other["ids"]


def test_requests_of_one_batch_are_steered_differently(engine: EngineProcess) -> None:
    lab = {"sailguard_tenant": "lab"}
    asked = [lab, {**lab, "sailguard_steer": "politics=2"}, {**lab, "sailguard_steer": "violence=clamp:1.5"}]
    found = engine.chat(["Tell me about the weather."] * 3, [{**GREEDY, "extra_args": args} for args in asked])

    assert len({str(answer["ids"]) for (answer,) in found}) == 3
    plain, politics, _ = [answer["report"]["response_scores"] for (answer,) in found]
    assert politics["politics"] > plain["politics"]

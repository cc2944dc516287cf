"""A blocked request ends at the deciding token, also one without an end of its own, and the others go on unchanged."""

from __future__ import annotations

from typing import Any

import pytest

from guard.metrics import Metrics
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.continuous.requests import batching, greedy, median_cut, run
from tests.guard.generation import BLOCK, END


def test_prompt_verdict_blocks_before_the_first_token(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    metrics = Metrics()
    guard = attach(make_policy(BLOCK), metrics, violence=True)
    assert run(chatty, ids, max_batch_tokens=9) == [[]] * len(ids)
    for report in guard.reports:
        assert (report.action, report.tokens_generated) == ("block", 0)
        assert {v.phase for v in report.verdicts} == {"prompt"}
    value = metrics.registry.get_sample_value
    assert value("sailguard_requests_total", {"phase": "prompt", "result": "block"}) == len(ids)
    assert value("sailguard_verdicts_total", {"domain": "violence", "action": "block"}) == len(ids)


@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 7}, {"max_requests_per_batch": 2}])
def test_blocked_requests_end_at_the_deciding_token_and_the_others_go_on(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids, **shape)
    cut = median_cut(guard.reports, "response")
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "threshold": {"probability": cut}}), **VARIED)
    found = run(chatty, ids, **shape)
    actions = [report.action for report in guard.reports]
    assert sorted(actions) == ["allow"] * 3 + ["block"] * 3
    for row, report in enumerate(guard.reports):
        if report.action == "allow":
            assert found[row] == unguarded[row]
        else:
            assert found[row] == unguarded[row][: report.verdicts[0].token_index + 1]
            assert report.tokens_observed == report.tokens_generated == len(found[row])


def test_end_token_that_is_suppressed_does_not_keep_a_blocked_request_alive(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"]}), violence=True)
    config = greedy(40, suppress_tokens=[END])
    outputs = chatty.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
    assert [len(output.generated_tokens) for output in outputs.values()] == [3] * len(ids)
    assert [report.action for report in guard.reports] == ["block"] * len(ids)


@pytest.mark.parametrize("end", [-1, None])
@pytest.mark.parametrize("limit", [40, None])
def test_request_without_an_end_can_be_stopped(
    attach: Attach, chatty: Any, ids: list[list[int]], end: int | None, limit: int | None
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"]}), violence=True)
    config = greedy(40)
    config.eos_token_id, config.max_new_tokens = end, limit
    outputs = chatty.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
    assert [len(output.generated_tokens) for output in outputs.values()] == [3] * len(ids)
    assert [report.tokens_observed for report in guard.reports] == [3] * len(ids)

"""Steering changes its own requests alone, from the verdict on, also where a preempted request is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.session import AttachedGuard
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.continuous.requests import STEER, assert_same_reports, median_cut, one_by_one, run, run_together


@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 16}, {"page_size": 4, "num_blocks": 40}])
def test_steering_changes_only_its_own_requests(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids)
    cut = median_cut(guard.reports, "prompt")
    guard = attach(make_policy({**STEER, "threshold": {"probability": cut}}), **VARIED)
    alone, expected = one_by_one(guard, ids)
    found = run(chatty, ids, **shape)
    assert found == alone
    assert_same_reports(guard.reports, expected)
    assert sorted(report.action for report in guard.reports) == ["allow"] * 3 + ["steer"] * 3
    for row, report in enumerate(guard.reports):
        assert (found[row] == unguarded[row]) == (report.action == "allow")


def test_steering_that_begins_in_an_answer_is_that_of_generate(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy(), **VARIED)
    run(chatty, ids, 24)
    cut = median_cut(guard.reports, "response")
    steer = {"op": "clamp", "strength": 3.0}
    rule = {**STEER, "scope": ["response"], "threshold": {"probability": cut}, "steer": steer, "cooldown_tokens": 2}
    guard = attach(make_policy(rule), **VARIED)
    alone, expected = one_by_one(guard, ids, 24)
    assert run(chatty, ids, 24) == alone
    assert_same_reports(guard.reports, expected)
    assert {report.action for report in expected} == {"allow", "steer"}


def test_steered_positions_are_those_from_the_verdict_on(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    """Seen by a hook of its own: which rows of which pass differ from those of an unguarded model."""
    seen: list[tuple[list[int], list[int], Tensor]] = []
    layer = chatty.model.layers[int(HOOKS[0].split(".")[1])]

    def passes(guard: AttachedGuard | None) -> dict[tuple[int, int], Tensor]:
        seen.clear()

        def before(_: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            seen.append((kwargs["cu_seq_lens_q"].tolist(), kwargs["position_ids"][0].tolist(), torch.empty(0)))

        def see(_: Any, _args: Any, output: Any) -> None:
            seen[-1] = (*seen[-1][:2], (output if isinstance(output, Tensor) else output[0])[0].clone())

        handles = [chatty.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(see)]
        run_together(chatty, ids[:3], allow_block_sharing=False)  # which would sort them
        for handle in handles:
            handle.remove()
        found = {}
        for edges, positions, hidden in seen:
            for number in range(len(edges) - 1):
                for row in range(edges[number], edges[number + 1]):
                    found[number, positions[row]] = hidden[row]
        return found

    free = passes(None)
    rule = {**STEER, "steer": {"op": "add", "strength": 1e-4}}  # too weak to change a token
    guard = attach(make_policy(rule), violence=True)
    steered = passes(guard)
    for (number, position), hidden in free.items():
        same = torch.equal(steered[number, position], hidden)
        assert same == (position < len(ids[number])), (number, position)
    assert [report.action for report in guard.reports] == ["steer"] * 3


@pytest.mark.parametrize("scope", ["prompt", "response"])
def test_request_that_is_read_again_is_steered_as_it_was(
    attach: Attach, chatty: Any, ids: list[list[int]], scope: str
) -> None:
    """What the layers after the hook get at a position is the same whenever it is read."""
    guard = attach(make_policy({**STEER, "scope": [scope]}), violence=True)
    read: dict[tuple[str, int], list[Tensor]] = {}

    def see(_: Any, _args: Any, output: Any) -> None:
        hidden = (output if isinstance(output, Tensor) else output[0])[0]
        for _, share, _ in guard._engine.continuous._pass:
            for i in range(len(share.ids)):
                read.setdefault((share.request_id, share.position + i), []).append(hidden[share.start + i].clone())

    handle = chatty.model.layers[int(HOOKS[0].split(".")[1])].register_forward_hook(see)
    run(chatty, ids, page_size=4, num_blocks=40)
    handle.remove()
    again = {place: found for place, found in read.items() if len(found) > 1}
    assert any(position >= len(ids[int(name.removeprefix("req_"))]) + 3 for name, position in again)
    for place, found in again.items():
        torch.testing.assert_close(
            torch.stack(found), found[0].expand(len(found), -1), atol=1e-4, rtol=1e-4, msg=str(place)
        )
    assert [report.action for report in guard.reports] == ["steer"] * len(ids)

"""Requests join, stream, are called off and are scored beside; no token is shown before it was judged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from guard.errors import GuardError
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.continuous.requests import JOIN, Streamed, assert_same_reports, batching, greedy, one_by_one
from tests.guard.generation import BLOCK, FLAG_ALL


def test_requests_join_and_leave_in_mid_flight(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    _, expected = one_by_one(guard, ids)
    options = {"generation_config": greedy(12), "continuous_batching_config": batching(max_requests_per_batch=3)}
    with chatty.continuous_batching_context_manager(**options) as manager:
        seen = Streamed(manager)
        names = [manager.add_request(ids[0], streaming=True), manager.add_request(ids[1], request_id="named")]
        seen.gather(lambda: len(seen.outputs.get(names[0], [])) >= 3)
        names += manager.add_requests(ids[2:], streaming=True)
        seen.gather(lambda: len(seen.finished) == len(ids))
    assert names[1] == "named"
    assert [seen.finished[name].generated_tokens for name in names] == unguarded
    assert [report.request_id for report in guard.reports] == names
    assert_same_reports(guard.reports, expected)


def test_a_stream_shows_a_token_only_after_it_was_judged(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    observed: dict[str, list[tuple[int, int]]] = {}
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching()
    ) as manager:
        deliver = guard._engine.continuous._tap._deliver_batch  # type: ignore[union-attr]

        def watch(outputs: list[Any]) -> None:
            for output in outputs:
                request = guard._engine.continuous._requests.get(output.request_id)
                judged = 12 if request is None else int(request.begin().count[0])
                observed.setdefault(output.request_id, []).append((len(output.generated_tokens), judged))
            deliver(outputs)

        guard._engine.continuous._tap._deliver_batch = watch  # type: ignore[union-attr]
        names = manager.add_requests(ids, streaming=True)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    for number, name in enumerate(names):
        steps = seen.outputs[name]
        assert steps == [unguarded[number][:n] for n in range(1, 13)]
        assert all(shown <= judged for shown, judged in observed[name])


def test_a_stream_that_may_still_be_blocked_is_held_back(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 4}), violence=True)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching()
    ) as manager:
        names = manager.add_requests(ids, streaming=True)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    deciding = [report.verdicts[0].token_index for report in guard.reports]
    assert [[len(step) for step in seen.outputs[name]] for name in names] == [[n + 1] for n in deciding]


def test_streams_read_through_handlers_are_cut_too(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 5}), violence=True)

    async def read(manager: Any, name: str, prompt: list[int]) -> list[int]:
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(name, outputs.put_nowait)
        manager.add_request(prompt, request_id=name, streaming=True)
        while not (output := await asyncio.wait_for(outputs.get(), JOIN)).is_finished():
            pass
        tokens: list[int] = output.generated_tokens
        return tokens

    async def read_all() -> list[list[int]]:
        with chatty.continuous_batching_context_manager(
            generation_config=greedy(12), continuous_batching_config=batching()
        ) as manager:
            return await asyncio.gather(*(read(manager, str(i), prompt) for i, prompt in enumerate(ids)))

    found = asyncio.run(read_all())
    assert found == [row[:5] for row in unguarded]
    assert [report.tokens_observed for report in guard.reports] == [5] * len(ids)


def test_a_request_that_is_called_off_is_reported_and_lets_the_others_go_on(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(400), continuous_batching_config=batching()
    ) as manager:
        seen = Streamed(manager)
        manager.add_request(ids[0], request_id="endless", streaming=True)
        seen.gather(lambda: len(seen.outputs.get("endless", [])) >= 3)
        manager.add_request(ids[1], request_id="short", max_new_tokens=12)
        manager.cancel_request("endless")
        manager.cancel_request("unheard of")
        seen.gather(lambda: "short" in seen.finished)
        manager.add_request(ids[2], request_id="endless", max_new_tokens=12)  # its name is free again
        seen.gather(lambda: "endless" in seen.finished)
    first, short, last = guard.reports
    assert (first.request_id, short.request_id, last.request_id) == ("endless", "short", "endless")
    assert 3 <= first.tokens_generated == first.tokens_observed < 400
    assert seen.finished["short"].generated_tokens == unguarded[1]
    assert seen.finished["endless"].generated_tokens == unguarded[2]


def test_texts_are_scored_while_requests_run(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    (expected,) = guard.score(["something else entirely"])
    _, reports = one_by_one(guard, ids)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(12), continuous_batching_config=batching(max_requests_per_batch=1)
    ) as manager:
        names = manager.add_requests(ids)
        for _ in range(5):
            assert guard.score(["something else entirely"])[0].scores == pytest.approx(expected.scores, abs=1e-5)
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(ids))
    assert [seen.finished[name].generated_tokens for name in names] == unguarded
    assert_same_reports(guard.reports, reports)


def test_one_generation_at_a_time(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy())
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(5), continuous_batching_config=batching()
    ) as manager:
        for use in (
            lambda: chatty.generate(torch.tensor([ids[0]]), max_new_tokens=3),
            lambda: chatty(torch.tensor([ids[0]])),
            lambda: guard.chat([{"role": "user", "content": "x"}], max_new_tokens=2),
            lambda: chatty.generate_batch(ids),
        ):
            with pytest.raises(GuardError, match="running"):
                use()
        manager.add_request(ids[0], request_id="one", max_new_tokens=200)
        with pytest.raises(GuardError, match="in flight"):
            manager.add_request(ids[0], request_id="one")
        manager.cancel_request("one")
    assert guard.chat([{"role": "user", "content": "x"}], max_new_tokens=2).completion_tokens == 2

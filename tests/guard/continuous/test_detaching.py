"""A guard that is detached or paused leaves the model and its managers as they were, and stops what is running."""

from __future__ import annotations

from typing import Any

from guard.core import Guard
from tests.factories import hooks_of, make_policy
from tests.guard.conftest import VARIED, Attach, MakeBank
from tests.guard.continuous.requests import Streamed, batching, greedy, run
from tests.guard.generation import BLOCK, FLAG_ALL

NAMES = ("generate", "generate_batch", "init_continuous_batching")


def test_second_call_begins_anew_also_with_a_manager_that_is_kept(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    config = {"generation_config": greedy(12), "continuous_batching_config": batching()}
    for _ in range(2):
        outputs = chatty.generate_batch(ids, persistent_manager=True, **config)
        assert [output.generated_tokens for output in outputs.values()] == unguarded
        assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)
    guard.close()
    assert "_cached_continuous_batching_manager" not in vars(chatty)
    assert run(chatty, ids) == unguarded


def test_detaching_restores_the_model(
    bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any, ids: list[list[int]]
) -> None:
    free, names = run(chatty, ids), set(vars(chatty))
    with Guard(bank_of(violence=True), make_policy(BLOCK)).attach(chatty, tiny_tokenizer):
        manager = chatty.init_continuous_batching(generation_config=greedy(12), continuous_batching_config=batching())
        assert run(chatty, ids) == [[]] * len(ids)
    assert (set(vars(chatty)), hooks_of(chatty)) == (names, 0)
    assert not set(NAMES) & set(vars(chatty))
    assert "add_request" not in vars(manager)
    assert run(chatty, ids) == free


def test_detaching_stops_what_is_running(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    with chatty.continuous_batching_context_manager(
        generation_config=greedy(400), continuous_batching_config=batching(num_blocks=300)
    ) as manager:
        seen = Streamed(manager)
        names = manager.add_requests(ids, streaming=True)
        seen.gather(lambda: all(len(seen.outputs.get(name, [])) >= 3 for name in names))
        guard.close()
        assert not manager.is_running()
        assert "deliver" not in vars(manager.output_router)
        left = [
            manager.output_router.output_queue.get_nowait() for _ in range(manager.output_router.output_queue.qsize())
        ]
    failed = {output.request_id: output for output in left if output.is_finished()}
    assert {output.error is None for output in failed.values()} == {False}
    assert [len(failed[name].generated_tokens) for name in names] == [r.tokens_observed for r in guard.reports]


def test_guard_that_is_paused_leaves_the_model_alone(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(BLOCK), violence=True)
    with guard._engine.paused():
        assert run(chatty, ids) == unguarded
    assert guard.reports == []
    assert run(chatty, ids) == [[]] * len(ids)

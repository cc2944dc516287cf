"""A failing guard stops all requests in flight, or is let pass and counted; a failing model leaves the guard usable."""

from __future__ import annotations

from typing import Any

import pytest

from guard.errors import UnsupportedGenerationError
from guard.metrics import Metrics
from guard.session import AttachedGuard
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.continuous.requests import batching, greedy, run, run_together
from tests.guard.generation import FLAG_ALL


def fail(guard: AttachedGuard, monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    calls: list[int] = []
    original = getattr(guard.monitor, place)

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise ValueError("injected")
        return original(*args)

    monkeypatch.setattr(guard.monitor, place, broken)


@pytest.mark.parametrize(("place", "shown"), [("observe_prompt", 0), ("observe_each", 3)])
def test_failure_stops_every_request_in_flight(
    attach: Attach,
    chatty: Any,
    ids: list[list[int]],
    unguarded: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    shown: int,
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(), metrics, **VARIED)
    fail(guard, monkeypatch, place, 3)
    outputs = run_together(chatty, ids)
    assert [output.generated_tokens for output in outputs] == [row[:shown] for row in unguarded]
    assert [report.action for report in guard.reports] == ["block"] * len(ids)
    assert guard.errors == ["ValueError: injected"]
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": "block"}) == 1


@pytest.mark.parametrize(("on_error", "action"), [("allow", "allow"), ("flag", "flag")])
@pytest.mark.parametrize("shape", [{}, {"max_batch_tokens": 9}])
@pytest.mark.parametrize("place", ["observe_prompt", "observe_each"])
def test_failure_that_is_let_pass_is_counted_and_told(
    attach: Attach,
    chatty: Any,
    ids: list[list[int]],
    unguarded: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    on_error: str,
    action: str,
    shape: dict[str, Any],
    place: str,
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(on_error=on_error), metrics, **VARIED)
    fail(guard, monkeypatch, place, 3)
    assert run(chatty, ids, **shape) == unguarded
    actions = [report.action for report in guard.reports]
    assert action in actions
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": on_error}) == len(guard.errors) > 0
    if place == "observe_each":
        assert min(report.tokens_observed for report in guard.reports) < 12
    assert {report.tokens_generated for report in guard.reports} == {12}


def test_hooks_that_were_removed_are_noticed_and_nothing_is_emitted(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy())
    for layer in chatty.model.layers:
        layer._forward_hooks.clear()
    assert run(chatty, ids) == [[]] * len(ids)
    assert "did not fire" in guard.errors[0]


def test_failure_at_the_end_of_a_request_emits_nothing_of_it(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = attach(make_policy(), **VARIED)
    fail(guard, monkeypatch, "finish", 1)
    assert run(chatty, ids[:1]) == [[]]
    assert guard.reports[0].action == "block"


@pytest.mark.parametrize("on_error", ["block", "allow"])
def test_a_pass_that_cannot_be_mapped_fails_every_request(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    from guard.engines import batch_manager

    guard = attach(make_policy(on_error=on_error))
    original = batch_manager.read_shares
    calls: list[int] = []

    def shifted(manager: Any, kwargs: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) == 4:
            kwargs = {**kwargs, "cu_seq_lens_q": kwargs["cu_seq_lens_q"] + 1}
        return original(manager, kwargs)

    monkeypatch.setattr("guard.engines.continuous.read_shares", shifted)
    for output in run_together(chatty, ids):
        assert "not that of the" in output.error
        assert len(output.generated_tokens) == 2  # read and judged before
    assert len(guard.reports) == len(ids)
    calls.clear()
    with pytest.raises(UnsupportedGenerationError, match="not that of the"):
        chatty.generate_batch(ids, generation_config=greedy(12), continuous_batching_config=batching())
    monkeypatch.undo()
    run(chatty, ids)


def test_error_in_the_model_fails_the_requests_and_leaves_the_guard_usable(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("injected")

    handle = chatty.model.layers[-1].register_forward_pre_hook(hook)
    outputs = run_together(chatty, ids)
    handle.remove()
    assert {output.error for output in outputs} == {"injected"}
    assert [output.generated_tokens for output in outputs] == [row[:2] for row in unguarded]
    assert [report.tokens_observed for report in guard.reports] == [2] * len(ids)
    assert run(chatty, ids) == unguarded

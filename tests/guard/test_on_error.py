"""When the guard itself fails, the policy decides: by default everything stops, and it is always counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.metrics import Metrics
from guard.session import AttachedGuard
from tests.factories import make_policy
from tests.guard.conftest import Attach

HELLO = [{"role": "user", "content": "hello there, little model"}]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def fail(guard: AttachedGuard, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Make judging raise: of prompts, or of the third response token and all after it."""
    calls: list[int] = []
    original = getattr(guard.monitor, place)

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if place == "observe_prompt" or len(calls) >= 3:
            raise ValueError("injected")
        return original(*args, **kwargs)

    monkeypatch.setattr(guard.monitor, place, broken)


def errors(metrics: Metrics, on_error: str) -> float | None:
    return metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": on_error})


@pytest.mark.parametrize("place", ["observe_prompt", "observe_hidden"])
def test_failure_blocks_by_default(attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    metrics = Metrics()
    guard = attach(make_policy(), metrics)
    fail(guard, monkeypatch, place)
    events = list(guard.stream(HELLO, max_new_tokens=10))
    assert (events[-1].text, events[-1].finish_reason) == ("REFUSED", "content_filter")
    assert guard.reports[0].action == "block"
    assert guard.errors == ["ValueError: injected"]
    assert errors(metrics, "block") == 1
    answered = 0 if place == "observe_prompt" else 3
    assert guard.reports[0].tokens_generated == answered
    phase = "prompt" if place == "observe_prompt" else "response"
    value = metrics.registry.get_sample_value
    assert value("sailguard_requests_total", {"phase": phase, "result": "error"}) == 1


@pytest.mark.parametrize("place", ["observe_prompt", "observe_hidden"])
def test_failure_blocks_every_row_of_a_batch(
    attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    guard = attach(make_policy())
    fail(guard, monkeypatch, place)
    output = chatty.generate(IDS, max_new_tokens=10, do_sample=False)
    answered = 0 if place == "observe_prompt" else 3
    assert output.shape[1] == 4 + answered + 1
    assert [report.action for report in guard.reports] == ["block", "block"]
    assert {c.text for c in guard.complete([HELLO, HELLO], max_new_tokens=5)} == {"REFUSED"}


@pytest.mark.parametrize(("on_error", "action"), [("allow", "allow"), ("flag", "flag")])
def test_failure_that_is_let_pass_is_counted(
    attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch, on_error: str, action: str
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(on_error=on_error), metrics)
    expected = guard.chat(HELLO, max_new_tokens=10).text
    fail(guard, monkeypatch, "observe_hidden")
    completion = guard.chat(HELLO, max_new_tokens=10)
    assert (completion.text, completion.finish_reason) == (expected, "length")
    assert completion.report.action == action
    assert completion.report.tokens_observed < completion.report.tokens_generated == 10
    assert errors(metrics, on_error) == len(guard.errors) >= 7
    assert errors(metrics, "block") == 0


def test_failing_steering_blocks(attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.steering import Steering

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    guard = attach(make_policy({"domain": "violence", "action": "steer"}), violence=True)
    monkeypatch.setattr(Steering, "apply", broken)
    assert guard.chat(HELLO, max_new_tokens=10).text == "REFUSED"
    assert guard.errors[0] == "RuntimeError: injected"


def test_nan_in_the_model_blocks(attach: Attach, chatty: Any) -> None:
    guard = attach(make_policy())
    with torch.no_grad():
        chatty.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    assert guard.chat(HELLO, max_new_tokens=10).text == "REFUSED"
    assert "NaN" in guard.errors[0]


def test_errors_are_those_of_the_last_generation(attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = attach(make_policy())
    with monkeypatch.context() as patch:
        fail(guard, patch, "observe_prompt")
        guard.chat(HELLO, max_new_tokens=3)
    assert guard.errors
    assert guard.chat(HELLO, max_new_tokens=3).finish_reason == "length"
    assert guard.errors == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruption_is_no_failure_of_the_guard(
    attach: Attach, chatty: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def broken(*_: Any) -> None:
        raise error

    metrics = Metrics()
    guard = attach(make_policy(on_error="allow"), metrics)
    monkeypatch.setattr(guard.monitor, "observe_hidden", broken)
    with pytest.raises(error):
        guard.chat(HELLO, max_new_tokens=3)
    assert errors(metrics, "allow") == 0

"""Detaching gives the model back bit for bit, whatever happened while the guard was attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from guard.core import Guard
from guard.errors import GuardError
from guard.metrics import Metrics
from guard.session import AttachedGuard
from tests.factories import hooks_of, make_policy
from tests.guard.conftest import Attach, MakeBank

HELLO = [{"role": "user", "content": "hello there, little model"}]
IDS = torch.tensor([[5, 6, 7, 8]])
STEER = {"domain": "violence", "action": "steer", "steer": {"strength": 5.0}}


def fingerprint(model: Any) -> tuple[set[str], int, torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        logits = model(IDS).logits
    return set(vars(model)), hooks_of(model), logits, model.generate(IDS, max_new_tokens=6, do_sample=False)


def interrupt_at(model: Any, error: type[BaseException], call: int) -> Callable[[], None]:
    """Make the model's last layer raise on its `call`-th forward pass; returns the undoing."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error("injected")

    handle = model.model.layers[-1].register_forward_pre_hook(hook)
    return handle.remove


def use_normally(guard: AttachedGuard) -> None:
    guard.chat(HELLO, max_new_tokens=5)
    guard.score(["x"])
    guard.complete([HELLO, HELLO], max_new_tokens=3)


def use_until_error(error: type[BaseException], call: int) -> Callable[[AttachedGuard], None]:
    def use(guard: AttachedGuard) -> None:
        for action in (
            lambda: guard.model.generate(IDS, max_new_tokens=6, do_sample=False),
            lambda: guard.chat(HELLO, max_new_tokens=6),
            lambda: guard.complete([HELLO], max_new_tokens=6),
        ):
            undo = interrupt_at(guard.model, error, call)
            try:
                with pytest.raises(error, match="injected"):
                    action()
            finally:
                undo()
            assert guard._engine.state is None
            assert guard.reports == []

    return use


def use_half_a_stream(guard: AttachedGuard) -> None:
    stream = guard.stream(HELLO, max_new_tokens=20)
    next(stream)
    stream.close()
    assert guard._engine.state is None


def leave_a_stream_open(guard: AttachedGuard) -> None:
    next(guard.stream(HELLO, max_new_tokens=20))


@pytest.mark.parametrize(
    "use",
    [
        lambda guard: None,
        use_normally,
        use_until_error(RuntimeError, 1),
        use_until_error(RuntimeError, 3),
        use_until_error(KeyboardInterrupt, 3),
        use_half_a_stream,
        leave_a_stream_open,
    ],
)
def test_detaching_restores_the_model_bit_for_bit(
    bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any, use: Callable[[AttachedGuard], None]
) -> None:
    guard = Guard(bank_of(violence=True), make_policy(STEER))
    names, hooks, logits, ids = fingerprint(chatty)
    assert hooks == 0
    with guard.attach(chatty, tiny_tokenizer) as attached:
        assert hooks_of(chatty) > 0
        use(attached)
    after = fingerprint(chatty)
    assert after[:2] == (names, 0)
    assert "generate" not in vars(chatty)
    assert torch.equal(after[2], logits)
    assert torch.equal(after[3], ids)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_guard_works_on_after_an_interrupted_generation(
    attach: Attach, chatty: Any, error: type[BaseException]
) -> None:
    guard = attach(make_policy(STEER), violence=True)
    expected = guard.chat(HELLO, max_new_tokens=8)
    use_until_error(error, 3)(guard)
    again = guard.chat(HELLO, max_new_tokens=8)
    assert again.text == expected.text
    assert again.report.response_scores == expected.report.response_scores


def test_exception_in_the_block_detaches_too(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(bank_of(), make_policy())

    def use() -> None:
        with guard.attach(tiny_model, tiny_tokenizer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert hooks_of(tiny_model) == 0


def test_closing_twice_is_harmless_and_use_after_it_is_refused(attach: Attach, tiny_model: Any) -> None:
    guard = attach(make_policy())
    guard.close()
    guard.close()
    for call in (
        lambda: guard.chat(HELLO),
        lambda: guard.score(["x"]),
        lambda: guard.trace("x"),
        lambda: guard.complete([HELLO]),
        lambda: list(guard.stream(HELLO)),
    ):
        with pytest.raises(GuardError, match="detached"):
            call()


def test_one_guard_serves_several_models_without_sharing_their_sequences(
    bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any
) -> None:
    import copy

    guard = Guard(bank_of(violence=None), make_policy())
    twin = copy.deepcopy(chatty)
    with guard.attach(chatty, tiny_tokenizer) as first, guard.attach(twin, tiny_tokenizer) as second:
        expected = first.chat(HELLO, max_new_tokens=6)
        stream = first.stream(HELLO, max_new_tokens=6)
        events = [next(stream)]
        second.chat([{"role": "user", "content": "x"}], max_new_tokens=4)
        events += stream
        assert "".join(event.text for event in events) == expected.text
        assert first.reports[0].response_scores == expected.report.response_scores


def test_stream_never_goes_on_unguarded(attach: Attach, chatty: Any) -> None:
    guard = attach(make_policy())
    stream = guard.stream(HELLO, max_new_tokens=20)
    next(stream)
    guard.close()
    with pytest.raises(GuardError, match="detached"):
        next(stream)


def test_stream_never_goes_on_with_anothers_state(attach: Attach, chatty: Any) -> None:
    guard = attach(make_policy())
    first, second = guard.stream(HELLO, max_new_tokens=20), guard.stream(HELLO, max_new_tokens=6)
    next(first)
    next(second)
    with pytest.raises(GuardError, match="another generation"):
        next(first)
    assert [event.finish_reason for event in second][-1] == "length"
    assert guard.reports[0].tokens_observed == 6


def test_texts_can_be_scored_while_a_stream_is_open(attach: Attach, chatty: Any) -> None:
    guard = attach(make_policy(), violence=None)
    expected = guard.chat(HELLO, max_new_tokens=10)
    stream = guard.stream(HELLO, max_new_tokens=10)
    events = [next(stream)]
    guard.score(["something else entirely"])
    events += stream
    assert "".join(event.text for event in events) == expected.text
    assert guard.reports[0].response_scores == expected.report.response_scores


def test_closed_stream_is_reported_and_counted(attach: Attach, chatty: Any) -> None:
    metrics = Metrics()
    guard = attach(make_policy(), metrics)
    stream = guard.stream(HELLO, max_new_tokens=20)
    shown = [next(stream) for _ in range(3)]
    stream.close()
    report = guard.reports[0]
    assert report.tokens_generated == report.tokens_observed >= len(shown)
    assert metrics.registry.get_sample_value("sailguard_tokens_generated_total") == report.tokens_generated


def test_forward_passes_with_gradients_are_left_alone(attach: Attach, tiny_model: Any) -> None:
    attach(make_policy(STEER), violence=True)
    tiny_model.requires_grad_(True)
    loss = tiny_model(IDS, labels=IDS).loss
    loss.backward()
    assert tiny_model.model.layers[0].mlp.down_proj.weight.grad is not None

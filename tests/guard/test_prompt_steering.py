"""A prompt that is read once more, steered: as if it had been read so from the start, and the others as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.capture import Capture
from guard.errors import UnsupportedGenerationError
from guard.session import AttachedGuard
from guard.steering import Steering
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED, Attach

Batch = dict[str, Tensor]
STEER = {"op": "add", "strength": 5.0, "prompt": True}
TOKENS = 6


def rule(**changes: Any) -> dict[str, Any]:
    return {"domain": "violence", "action": "steer", "scope": ["prompt"], "steer": STEER} | changes


def generated(model: Any, batch: Batch, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The ids, and the logits of every step."""
    output = model.generate(
        **batch,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return output.sequences, list(output.logits)


def splitting_rule(attach: Attach, model: Any, batch: Batch, **steer: Any) -> dict[str, Any]:
    """A rule that fires on two of the four prompts."""
    guard = attach(make_policy(), **VARIED)
    generated(model, batch)
    scores = sorted(report.prompt_scores["violence"] for report in guard.reports)
    return rule(threshold={"probability": (scores[1] + scores[2]) / 2}, steer=STEER | steer)


def by_hand(guard: AttachedGuard, model: Any, batch: Batch, rows: list[int]) -> tuple[Tensor, list[Tensor]]:
    """What comes of steering every token of `rows` with a plain hook."""
    monitor = guard.monitor
    guard.close()
    steering = Steering(monitor.bank, monitor.encoder, len(batch["input_ids"]))
    (bound,) = monitor.rules["prompt"].rules
    for row in rows:
        steering.steer(row, bound)

    def observer(name: str, hidden: Tensor) -> Tensor | None:
        mask = batch["attention_mask"].bool()
        return steering.apply(name, hidden, mask if hidden.shape[1] > 1 else None)

    with Capture(model, HOOKS, observer):
        return generated(model, batch)


@pytest.mark.parametrize("op", ["add", "clamp"])
def test_it_is_as_if_the_prompt_had_been_steered_from_the_start(
    attach: Attach, chatty: Any, batch: Batch, op: str
) -> None:
    guard = attach(make_policy(splitting_rule(attach, chatty, batch, op=op, value=3.0)), **VARIED)
    ids, logits = generated(chatty, batch)
    actions = [report.action for report in guard.reports]
    assert sorted(actions) == ["allow", "allow", "steer", "steer"]
    assert [r.tokens_observed for r in guard.reports] == [r.tokens_generated for r in guard.reports]
    expected_ids, expected = by_hand(guard, chatty, batch, [i for i, a in enumerate(actions) if a == "steer"])
    assert torch.equal(ids, expected_ids)
    for found, wanted in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_prompts_whose_rule_did_not_fire_keep_their_bits(attach: Attach, chatty: Any, batch: Batch) -> None:
    made = splitting_rule(attach, chatty, batch)
    guard = attach(make_policy(), **VARIED)
    free_ids, free = generated(chatty, batch)
    guard = attach(make_policy(made), **VARIED)
    ids, logits = generated(chatty, batch)
    for row, report in enumerate(guard.reports):
        same = torch.equal(ids[row], free_ids[row]) and all(
            torch.equal(a[row], b[row]) for a, b in zip(logits, free, strict=True)
        )
        assert same == (report.action == "allow")
        assert torch.equal(logits[0][row], free[0][row]) == (report.action == "allow")  # the prompt's own logits


def test_a_rule_that_does_not_ask_for_it_leaves_the_prompt_as_it_is(attach: Attach, chatty: Any, batch: Batch) -> None:
    attach(make_policy(rule(steer=STEER | {"prompt": False})), violence=True)
    _, logits = generated(chatty, batch)
    attach(make_policy(), violence=True)
    _, free = generated(chatty, batch)
    assert torch.equal(logits[0], free[0])
    assert not torch.equal(logits[1], free[1])


def test_a_prompt_is_judged_once_and_a_block_still_ends_the_answer(attach: Attach, chatty: Any, batch: Batch) -> None:
    block = {"domain": "violence", "action": "block", "scope": ["prompt"]}
    guard = attach(make_policy(rule(), block), violence=True)
    ids, _ = generated(chatty, batch)
    assert all(report.action == "block" for report in guard.reports)
    assert all([v.rule for v in report.verdicts] == ["violence-steer", "violence-block"] for report in guard.reports)
    assert (ids[:, batch["input_ids"].shape[1]] == 2).all()


def test_streams_are_steered_alike(attach: Attach, chatty: Any) -> None:
    chat = [{"role": "user", "content": "Tell me a story about a bird."}]
    guard = attach(make_policy(rule()), violence=True)
    streamed = "".join(event.text for event in guard.stream(chat, max_new_tokens=TOKENS))
    (whole,) = guard.complete([chat], max_new_tokens=TOKENS)
    assert streamed == whole.text
    guard = attach(make_policy(), violence=True)
    assert streamed != guard.chat(chat, max_new_tokens=TOKENS).text


def test_a_cache_that_cannot_be_emptied_is_refused(attach: Attach, chatty: Any, batch: Batch) -> None:
    from transformers import DynamicCache

    class Fixed(DynamicCache):
        def crop(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("the window has moved on")

    attach(make_policy(rule()), violence=True)
    with pytest.raises(UnsupportedGenerationError, match="cannot be emptied"):
        chatty(**batch, past_key_values=Fixed(config=chatty.config))


def test_continuous_batching_refuses_it_by_name(attach: Attach, tiny_model: Any, batch: Batch) -> None:
    attach(make_policy(rule(name="turn")), violence=True)
    with pytest.raises(UnsupportedGenerationError, match="rule 'turn' steers prompts"):
        tiny_model.generate_batch([[3, 4, 5]], max_new_tokens=2)

"""Guards in threads of one process: each model, guard and sequence keeps to itself."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from guard.core import Guard
from guard.events import SequenceReport
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank

ROUNDS = 4
RULES = [{"domain": name, "action": "flag", "evidence_tokens": 2} for name in VARIED]


@pytest.mark.parametrize("shared", [True, False], ids=["one guard", "two guards"])
def test_two_guarded_models_in_two_threads_do_as_each_does_alone(
    bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any, batch: dict[str, torch.Tensor], shared: bool
) -> None:
    bank = bank_of(**VARIED)
    models = [copy.deepcopy(chatty), copy.deepcopy(chatty)]
    steer = {"domain": "violence", "action": "steer", "threshold": {"probability": 0.01}, "steer": {"strength": 4.0}}
    first = Guard(bank, make_policy(*RULES))
    guards = [first, first if shared else Guard(bank, make_policy(steer))]
    halves = [{name: values[half] for name, values in batch.items()} for half in (slice(0, 2), slice(2, 4))]

    def run(number: int, found: list[tuple[list[list[int]], list[SequenceReport]]]) -> None:
        with guards[number].attach(models[number], tiny_tokenizer) as attached:
            for _ in range(ROUNDS):
                output = models[number].generate(**halves[number], max_new_tokens=24, do_sample=False)
                found.append((output.tolist(), attached.reports))

    alone: list[list[Any]] = [[], []]
    for number in (0, 1):
        run(number, alone[number])
    together: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=run, args=(number, together[number])) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(together[number]) == ROUNDS
        for (tokens, reports), (expected, known) in zip(together[number], alone[number], strict=True):
            assert tokens == expected
            assert [(r.action, r.tokens_observed, r.tokens_generated) for r in reports] == [
                (r.action, r.tokens_observed, r.tokens_generated) for r in known
            ]
            assert [r.response_scores for r in reports] == [pytest.approx(r.response_scores, abs=1e-5) for r in known]
    if not shared:
        assert {report.action for _, reports in alone[1] for report in reports} == {"steer"}


def test_a_model_in_bfloat16_is_guarded_as_the_same_in_float32_is(
    bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any, batch: dict[str, torch.Tensor]
) -> None:
    guard = Guard(bank_of(**VARIED), make_policy(*RULES))
    low = copy.deepcopy(tiny_model).to(torch.bfloat16)
    with guard.attach(low, tiny_tokenizer) as attached:
        output = low.generate(**batch, max_new_tokens=20, do_sample=False, suppress_tokens=[0, 1, 2])
        reports = attached.reports
    assert [r.tokens_observed for r in reports] == [r.tokens_generated for r in reports] == [20] * 4
    # the same tokens again, read by the model in float32
    with guard.attach(tiny_model, tiny_tokenizer) as attached:
        ids, mask = output, torch.cat([batch["attention_mask"], torch.ones(4, 20, dtype=torch.long)], dim=1)
        width, cache = batch["input_ids"].shape[1], None
        for stop in range(width, ids.shape[1] + 1):
            start = 0 if cache is None else stop - 1
            step = tiny_model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=(mask[:, :stop].cumsum(1) - 1).clamp_min(0)[:, start:],
                past_key_values=cache,
                use_cache=True,
            )
            cache = step.past_key_values
        attached._engine.finish(ids[:, width:])
        exact = attached.reports
    for report, other in zip(reports, exact, strict=True):
        assert report.response_scores == pytest.approx(other.response_scores, abs=0.05)

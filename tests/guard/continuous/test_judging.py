"""Requests are judged as `generate` judges, each position once, however passes are cut; answers stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guard.core import Guard
from guard.engines.requests import Request
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.continuous.requests import STEER, assert_same_reports, batching, greedy, one_by_one, run
from tests.guard.generation import BLOCK, FLAG_ALL


def test_answers_are_those_of_an_unguarded_run_when_nothing_fires(
    attach: Attach, chatty: Any, ids: list[list[int]], unguarded: list[list[int]]
) -> None:
    guard = attach(make_policy(BLOCK, STEER), violence=False)
    assert run(chatty, ids) == unguarded
    assert [report.action for report in guard.reports] == ["allow"] * len(ids)
    assert [len(row) for row in unguarded] == [12] * len(ids)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"max_batch_tokens": 7},
        {"max_requests_per_batch": 2},
        {"scheduler_type": "prefill_first", "max_batch_tokens": 16},
        {"page_size": 4, "num_blocks": 40},
    ],
    ids=["all at once", "split prompts", "two at a time", "prompts first", "requests preempted"],
)
def test_verdicts_are_those_of_generate_however_passes_are_cut(
    attach: Attach, chatty: Any, ids: list[list[int]], shape: dict[str, Any]
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    answers, expected = one_by_one(guard, ids)
    assert run(chatty, ids, **shape) == answers
    assert sum(bool(report.verdicts) for report in expected) > 0
    assert_same_reports(guard.reports, expected)
    assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)


def test_requests_are_preempted_in_the_example_above(chatty: Any, ids: list[list[int]], attach: Attach) -> None:
    """It holds what it claims: tokens are read again from the start, and judged no second time."""
    again: list[int] = []
    unread = Request.unread
    guard = attach(make_policy(*FLAG_ALL), **VARIED)

    def count(request: Request, position: int, tokens: list[int]) -> int:
        again.append(unread(request, position, tokens))
        return again[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "unread", count)
        run(chatty, ids, page_size=4, num_blocks=40)
    assert sum(again) > 0
    assert [report.tokens_observed for report in guard.reports] == [12] * len(ids)


def test_every_position_is_judged_once(
    attach: Attach, chatty: Any, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    judged: dict[str, list[int]] = {}
    prompted: list[str] = []
    observe, judge = guard.monitor.observe_each, guard.monitor.observe_prompt

    def each(states: Any, sae_ins: Any) -> Any:
        for state in states:
            judged.setdefault(state.request_ids[0], []).append(int(state.count[0]))
        return observe(states, sae_ins)

    def prompt(state: Any, *args: Any) -> Any:
        prompted.append(state.request_ids[0])
        return judge(state, *args)

    monkeypatch.setattr(guard.monitor, "observe_each", each)
    monkeypatch.setattr(guard.monitor, "observe_prompt", prompt)
    run(chatty, ids, max_batch_tokens=9, max_requests_per_batch=3)
    names = [f"req_{i}" for i in range(len(ids))]
    assert sorted(prompted) == names
    assert judged == {name: list(range(12)) for name in names}
    assert [report.request_id for report in guard.reports] == names


@pytest.mark.parametrize("many", [False, True], ids=["a few", "more than one compiled call takes"])
def test_several_tokens_of_one_pass_are_judged_as_each_alone(attach: Attach, many: bool) -> None:
    monitor = attach(make_policy(*FLAG_ALL), **VARIED).monitor
    n = 20 if many else 3
    tokens = [{name: torch.randn(n, 32) * 3 for name in HOOKS} for _ in range(12)]
    states = [monitor.begin((str(i),)) for i in range(n)]
    batch = monitor.begin([str(i) for i in range(n)])
    for token in tokens:
        found = monitor.observe_each(states, token)
        fired = monitor.observe_hidden(batch, {name: x[:, None] for name, x in token.items()})
        assert [[v.rule for v in verdicts] for verdicts in found] == [
            [v.rule for row, v in fired if row == i] for i in range(n)
        ]
    for i, state in enumerate(states):
        assert monitor.scores(state, 0) == pytest.approx(monitor.scores(batch, i), abs=1e-5)


def test_requests_that_end_by_themselves_keep_their_end_token(
    attach: Attach, tiny_model: Any, ids: list[list[int]]
) -> None:
    ends = list(range(3, 60))
    config = greedy(12)
    config.eos_token_id = ends

    def answers() -> list[list[int]]:
        outputs = tiny_model.generate_batch(ids, generation_config=config, continuous_batching_config=batching())
        return [output.generated_tokens for output in outputs.values()]

    free = answers()
    assert len({len(row) for row in free}) > 1
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert answers() == free
    kept = [[token for token in row if token > 2] for row in free]
    expected = [len(row) - (row[-1] in ends) for row in kept]
    assert [report.tokens_generated for report in guard.reports] == expected
    assert [report.tokens_observed for report in guard.reports] == expected


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_short_answers_are_judged_to_the_last_token(
    attach: Attach, chatty: Any, ids: list[list[int]], tokens: int
) -> None:
    free = run(chatty, ids, tokens)
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert run(chatty, ids, tokens) == free
    assert [report.tokens_observed for report in guard.reports] == [tokens] * len(ids)


def test_answer_shorter_than_the_evidence_is_decided_at_its_end(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 6}), violence=True)
    run(chatty, ids, 3)
    assert [report.action for report in guard.reports] == ["block"] * len(ids)


def test_sampled_tokens_and_what_is_told_of_them_are_cut_alike(
    attach: Attach, chatty: Any, ids: list[list[int]]
) -> None:
    guard = attach(make_policy(*FLAG_ALL, BLOCK), **VARIED)
    config = greedy(12)
    config.do_sample = True
    outputs = chatty.generate_batch(
        ids,
        generation_config=config,
        continuous_batching_config=batching(return_logprobs=True, seed=1),
        record_timestamps=True,
    )
    for output, report in zip(outputs.values(), guard.reports, strict=True):
        assert len(output.generated_tokens) == len(output.logprobs) == len(output.timestamps)
        assert len(output.generated_tokens) == report.tokens_generated == report.tokens_observed


def test_paged_eager_attention_is_guarded_too(attach: Attach, chatty: Any, ids: list[list[int]]) -> None:
    chatty.set_attn_implementation("eager")
    free = run(chatty, ids)
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    assert run(chatty, ids, max_batch_tokens=20) == free
    _, expected = one_by_one(guard, ids)
    run(chatty, ids)
    assert_same_reports(guard.reports, expected)


def test_embedded_model_is_guarded_as_under_generate(embedded: Any) -> None:
    chats = ["Name three fruits.", "How do I kill a Python process?", "Describe how to stab a man with a knife."]
    with Guard.from_bank().attach(embedded.model, embedded.tokenizer) as guard:
        prompts = [guard.prompt_ids([{"role": "user", "content": chat}]) for chat in chats]
        guard.complete([[{"role": "user", "content": chats[0]}]], max_new_tokens=1)
        expected, answers = [], []
        for prompt in prompts:
            output = embedded.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            answers.append(output[0, len(prompt) :].tolist())
            expected += guard.reports
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=embedded.tokenizer.eos_token_id)
        outputs = embedded.model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching(max_batch_tokens=24)
        )
        found = [output.generated_tokens for output in outputs.values()]
        end = embedded.tokenizer.eos_token_id
        assert found == [row[: row.index(end)] if end in row else row for row in answers]
        assert_same_reports(guard.reports, expected)
        assert "block" in {report.action for report in guard.reports}

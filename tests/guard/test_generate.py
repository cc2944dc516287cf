"""`model.generate` under the guard: rows are sequences, every token is judged once, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.metrics import Metrics
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED, Attach
from tests.guard.generation import BLOCK, END, FLAG_ALL, Batch, answers, assert_same_report, row_alone


class Oracle:
    """Counts, with a hook of its own, how often each response position passes through the model's first layer."""

    def __init__(self, model: Any) -> None:
        self.widths: list[tuple[int, int]] = []
        self._handle = model.model.layers[0].register_forward_hook(self._see)

    def _see(self, _: Any, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        self.widths.append((hidden.shape[0], hidden.shape[1]))

    def close(self) -> None:
        self._handle.remove()


# ---- unchanged where nothing fires -----------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_generation_is_bit_equal_when_nothing_fires(attach: Attach, chatty: Any, batch: Batch, sample: bool) -> None:
    options = {"max_new_tokens": 12, "do_sample": sample, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    free = chatty.generate(**batch, **options)
    guard = attach(
        make_policy(BLOCK, {"domain": "terror", "action": "steer"}), **{**VARIED, "violence": False, "terror": False}
    )
    torch.manual_seed(3)
    guarded = chatty.generate(**batch, **options)
    assert torch.equal(guarded.sequences, free.sequences)
    for mine, other in zip(guarded.logits, free.logits, strict=True):
        assert torch.equal(mine, other)
    assert [report.action for report in guard.reports] == ["allow"] * 4


def test_zero_strength_is_bit_equal_although_the_rule_fires(attach: Attach, chatty: Any, batch: Batch) -> None:
    free = chatty.generate(**batch, max_new_tokens=12, do_sample=False)
    rule = {"domain": "violence", "action": "steer", "steer": {"op": "add", "strength": 0.0}}
    guard = attach(make_policy(rule), violence=True)
    assert torch.equal(chatty.generate(**batch, max_new_tokens=12, do_sample=False), free)
    assert [report.action for report in guard.reports] == ["steer"] * 4


def test_returned_cache_is_the_models_own(attach: Attach, chatty: Any, batch: Batch) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    free = chatty.generate(**batch, **options).past_key_values
    attach(make_policy(*FLAG_ALL), **VARIED)
    cache = chatty.generate(**batch, **options).past_key_values
    for mine, other in zip(cache.layers, free.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)


# ---- batches ---------------------------------------------------------------------------------------------


def test_row_of_a_padded_batch_is_judged_as_if_alone(attach: Attach, chatty: Any, batch: Batch) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    output = chatty.generate(**batch, max_new_tokens=16, do_sample=False)
    together = guard.reports
    assert sum(bool(report.verdicts) for report in together) > 0
    for row, ids in enumerate(answers(output, batch)):
        alone = row_alone(batch, row)
        assert answers(chatty.generate(**alone, max_new_tokens=16, do_sample=False), alone) == [ids]
        assert_same_report(together[row], guard.reports[0])


def test_neighbours_do_not_change_a_rows_report(attach: Attach, chatty: Any, batch: Batch) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    chatty.generate(**batch, max_new_tokens=10, do_sample=False)
    first = guard.reports
    order = [2, 0, 3, 1]
    chatty.generate(**{k: v[order] for k, v in batch.items()}, max_new_tokens=10, do_sample=False)
    for row, old in enumerate(order):
        assert_same_report(guard.reports[row], first[old])


def test_request_ids_are_distinct(attach: Attach, chatty: Any, batch: Batch) -> None:
    guard = attach(make_policy())
    ids = set()
    for _ in range(2):
        chatty.generate(**batch, max_new_tokens=1, do_sample=False)
        ids |= {report.request_id for report in guard.reports}
    assert len(ids) == 8


# ---- coverage --------------------------------------------------------------------------------------------


def coverage(metrics: Metrics) -> tuple[float | None, float | None]:
    value = metrics.registry.get_sample_value
    return value("sailguard_tokens_observed_total"), value("sailguard_tokens_generated_total")


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 7},
        {"max_new_tokens": 7, "do_sample": True, "temperature": 3.0},
        {"max_new_tokens": 7, "do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
        {"max_new_tokens": 12, "eos_token_id": list(range(3, 60))},  # rows end early, each at its time
        {"max_new_tokens": 12, "eos_token_id": list(range(3, 60)), "pad_token_id": 70},  # padding that looks like text
        {"max_new_tokens": 6, "repetition_penalty": 1.3, "min_new_tokens": 3},
    ],
)
def test_every_generated_token_is_observed_exactly_once(
    attach: Attach, chatty: Any, batch: Batch, options: dict[str, Any]
) -> None:
    metrics = Metrics()
    guard = attach(make_policy(*FLAG_ALL), metrics, **VARIED)
    oracle = Oracle(chatty)
    output = chatty.generate(**batch, **{"do_sample": False, "pad_token_id": END, **options})
    oracle.close()
    width = batch["input_ids"].shape[1]
    ends = options.get("eos_token_id", [END])
    expected = []
    for row in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        expected.append(stop)
    assert [report.tokens_generated for report in guard.reports] == expected
    assert [report.tokens_observed for report in guard.reports] == expected
    assert coverage(metrics) == (sum(expected), sum(expected))
    assert guard.errors == []
    rows = output.shape[0]
    steps = output.shape[1] - width
    unread = any(stop == steps for stop in expected)
    assert oracle.widths == [(rows, width)] + [(rows, 1)] * (steps - 1 + unread)


def test_last_token_is_read_as_generation_would_have_read_it(
    attach: Attach, chatty: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = attach(make_policy())
    observe = guard.monitor.observe_hidden
    seen: list[Tensor] = []

    def record(state: Any, sae_ins: dict[str, Tensor], live: Any = None) -> Any:
        seen.append(torch.cat(list(sae_ins.values()), dim=-1))
        return observe(state, sae_ins, live)

    monkeypatch.setattr(guard.monitor, "observe_hidden", record)
    for tokens in (5, 6):
        chatty.generate(**batch, max_new_tokens=tokens, do_sample=False)
    torch.testing.assert_close(torch.stack(seen[:5]), torch.stack(seen[5:10]), atol=1e-5, rtol=1e-5)


def test_rows_that_end_early_do_end_early(chatty: Any, batch: Batch) -> None:
    """The examples above hold what they claim: rows of one batch that end at different steps."""
    output = chatty.generate(
        **batch, max_new_tokens=12, do_sample=False, eos_token_id=list(range(3, 60)), pad_token_id=70
    )
    lengths = {row.index(70) if 70 in row else len(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()}
    assert len(lengths) > 1


def test_special_tokens_in_an_answer_are_neither_counted_nor_judged(
    attach: Attach, tiny_model: Any, batch: Batch
) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)

    class Alternate:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[:, 1] = 1e9 if ids.shape[1] % 2 else -1e9
            scores[:, END] = -1e9
            return scores

    output = tiny_model.generate(**batch, max_new_tokens=8, do_sample=False, logits_processor=[Alternate()])
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    expected = [sum(token not in (0, 1, 2) for token in row) for row in rows]
    assert [report.tokens_observed for report in guard.reports] == expected
    assert [report.tokens_generated for report in guard.reports] == expected
    assert all(0 < n < 8 for n in expected)


def test_removed_hooks_are_noticed_and_block(attach: Attach, chatty: Any, batch: Batch) -> None:
    metrics = Metrics()
    guard = attach(make_policy(), metrics)
    for layer in chatty.model.layers:
        layer._forward_hooks.clear()
    output = chatty.generate(**batch, max_new_tokens=8, do_sample=False)
    assert answers(output, batch) == [[]] * 4
    assert "did not fire" in guard.errors[0]
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": "block"}) >= 1


# ---- blocking --------------------------------------------------------------------------------------------


def test_prompt_verdict_blocks_before_the_first_token(attach: Attach, chatty: Any, batch: Batch) -> None:
    guard = attach(make_policy(BLOCK), violence=True)
    output = chatty.generate(**batch, max_new_tokens=8, do_sample=False)
    assert answers(output, batch) == [[]] * 4
    for report in guard.reports:
        assert (report.action, report.tokens_generated) == ("block", 0)
        assert {v.phase for v in report.verdicts} == {"prompt"}


@pytest.mark.parametrize("sample", [False, True])
def test_response_verdict_stops_at_the_deciding_token(attach: Attach, chatty: Any, batch: Batch, sample: bool) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 3}), violence=True)
    output = chatty.generate(**batch, max_new_tokens=20, do_sample=sample, num_return_sequences=1)
    assert [len(row) for row in answers(output, batch)] == [3] * 4
    assert [report.verdicts[0].token_index for report in guard.reports] == [2] * 4


def test_end_token_that_is_suppressed_does_not_keep_a_blocked_row_alive(
    attach: Attach, chatty: Any, batch: Batch
) -> None:
    guard = attach(make_policy(BLOCK), violence=True)
    output = chatty.generate(**batch, max_new_tokens=20, do_sample=False, min_new_tokens=15)
    assert output.shape[1] - batch["input_ids"].shape[1] <= 1
    assert [report.action for report in guard.reports] == ["block"] * 4


def test_blocked_row_does_not_stop_its_neighbours(attach: Attach, chatty: Any, batch: Batch) -> None:
    free = answers(chatty.generate(**batch, max_new_tokens=14, do_sample=False), batch)
    guard = attach(make_policy(), **VARIED)
    chatty.generate(**batch, max_new_tokens=14, do_sample=False)
    best = sorted(report.response_scores["violence"] for report in guard.reports)
    assert best[1] < best[2]
    cut = (best[1] + best[2]) / 2
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "threshold": {"probability": cut}}), **VARIED)
    found = answers(chatty.generate(**batch, max_new_tokens=14, do_sample=False), batch)
    actions = [report.action for report in guard.reports]
    assert sorted(actions) == ["allow", "allow", "block", "block"]
    for row, action in enumerate(actions):
        if action == "allow":
            assert found[row] == free[row]
        else:
            length = guard.reports[row].verdicts[0].token_index + 1
            assert found[row] == free[row][:length]


def test_flag_then_block_escalates(attach: Attach, chatty: Any, batch: Batch) -> None:
    rules = [
        {"domain": "violence", "action": "flag", "scope": ["response"], "evidence_tokens": 2},
        {"domain": "violence", "action": "block", "scope": ["response"], "evidence_tokens": 5},
    ]
    metrics = Metrics()
    guard = attach(make_policy(*rules), metrics, violence=True)
    chatty.generate(**batch, max_new_tokens=9, do_sample=False)
    for report in guard.reports:
        assert [(v.action, v.token_index) for v in report.verdicts] == [("flag", 1), ("block", 4)]
        assert report.action == "block"
    value = metrics.registry.get_sample_value
    assert value("sailguard_verdicts_total", {"domain": "violence", "action": "flag"}) == 4
    assert value("sailguard_requests_total", {"phase": "response", "result": "block"}) == 4


def test_own_loop_over_forward_passes_is_guarded(attach: Attach, chatty: Any, batch: Batch) -> None:
    guard = attach(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 2}), violence=True)
    ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
    tokens = []
    with torch.no_grad():
        for _ in range(4):
            output = chatty(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], 1)
            tokens.append(ids[:, 0].tolist())
    assert all(END not in step for step in tokens[:2])
    assert all(step == [END] * 4 for step in tokens[2:])
    assert guard._engine.state is not None


# ---- steering --------------------------------------------------------------------------------------------


def outputs_at_hooks(model: Any, batch: Batch, steps: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What every later module of the model receives from the hooked blocks, pass by pass, and the ids."""
    passes: list[dict[str, Tensor]] = []
    handles = []
    for hook in HOOKS:
        layer = model.model.layers[int(hook.split(".")[1])]

        def see(_: Any, _args: Any, output: Any, name: str = hook) -> None:
            if name == HOOKS[0]:
                passes.append({})
            passes[-1][name] = (output if isinstance(output, Tensor) else output[0]).clone()

        handles.append(layer.register_forward_hook(see))  # after the guard's own hook
    ids = model.generate(**batch, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    for handle in handles:
        handle.remove()
    return passes[:steps], ids


def test_steering_changes_only_the_steered_sequences_after_the_verdict(
    attach: Attach, chatty: Any, batch: Batch
) -> None:
    guard = attach(make_policy(), **VARIED)
    free, free_ids = outputs_at_hooks(chatty, batch, 8)
    scores = [report.prompt_scores["violence"] for report in guard.reports]
    cut = (sorted(scores)[1] + sorted(scores)[2]) / 2
    rule = {
        "domain": "violence",
        "action": "steer",
        "scope": ["prompt"],
        "threshold": {"probability": cut},
        "steer": {"op": "add", "strength": 5.0},
    }
    guard = attach(make_policy(rule), **VARIED)
    steered, ids = outputs_at_hooks(chatty, batch, 8)
    actions = [report.action for report in guard.reports]
    assert sorted(actions) == ["allow", "allow", "steer", "steer"]
    for row, action in enumerate(actions):
        for step in range(8):
            for hook in HOOKS:
                equal = torch.equal(steered[step][hook][row], free[step][hook][row])
                assert equal == (action == "allow" or step == 0), (row, step, hook)
        if action == "allow":
            assert torch.equal(ids[row], free_ids[row])


def test_steering_ends_with_the_generation(attach: Attach, chatty: Any, batch: Batch) -> None:
    rule = {"domain": "violence", "action": "steer", "steer": {"strength": 8.0}, "scope": ["prompt"]}
    free = chatty.generate(**batch, max_new_tokens=6, do_sample=False)
    guard = attach(make_policy(rule), **{**VARIED, "violence": True})
    first = chatty.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(chatty.generate(**batch, max_new_tokens=6, do_sample=False), first)
    guard.close()
    assert torch.equal(chatty.generate(**batch, max_new_tokens=6, do_sample=False), free)

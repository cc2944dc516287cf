"""Conditions in code and in files: what they mean, that they are kept, and what they do to a sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guard import concept, domain, feature
from guard.core import Guard
from guard.errors import PolicyError
from guard.monitor import Monitor
from guard.policy import Condition, Policy
from guard.rules import _holds
from tests.factories import make_bank, make_policy
from tests.guard.conftest import VARIED, MakeBank

CPU = torch.device("cpu")
A, B, C = (feature(f"L0/{i}") > 0.5 for i in range(3))


@pytest.fixture
def guard(bank_of: MakeBank) -> Guard:
    return Guard(bank_of(**VARIED), make_policy({"domain": "terror", "action": "flag"}))


def trees() -> st.SearchStrategy[Any]:
    leaves = st.integers(0, 5)
    joined = st.tuples(st.sampled_from("&|"), st.deferred(trees), st.deferred(trees))
    return st.one_of(leaves, leaves, joined)


def condition(tree: Any) -> Condition:
    if isinstance(tree, int):
        return feature(f"L0/{tree}") > 0.5
    left, right = condition(tree[1]), condition(tree[2])
    return left & right if tree[0] == "&" else left | right


def truth(tree: Any, known: np.ndarray) -> np.ndarray:
    if isinstance(tree, int):
        return known[tree]
    left, right = truth(tree[1], known), truth(tree[2], known)
    return left & right if tree[0] == "&" else left | right


@given(tree=trees(), seed=st.integers(0, 99))
def test_a_condition_holds_where_its_parts_say_so_and_survives_a_file(tree: Any, seed: int) -> None:
    made = condition(tree)
    known = np.random.default_rng(seed).random((6, 40)) < 0.5
    for read in (made, Condition.model_validate_json(made.model_dump_json(exclude_none=True))):
        signals = [known[int(str(signal.feature).partition("/")[2])] for signal in read.signals]
        np.testing.assert_array_equal(_holds(read, iter(signals)), truth(tree, known))


def test_what_is_joined_alike_is_one_list_and_reads_as_it_was_written() -> None:
    assert str(A & B & C) == "L0/0 > 0.5 & L0/1 > 0.5 & L0/2 > 0.5"
    assert len((A & B & C).parts) == 3
    assert str(A & (B | C)) == "L0/0 > 0.5 & (L0/1 > 0.5 | L0/2 > 0.5)"
    assert (
        str((concept("terror/attack") >= 0.2) | (domain("violence") > 0.75)) == "terror/attack > 0.2 | violence > 0.75"
    )


def test_a_condition_is_no_truth_value_and_its_numbers_are_checked() -> None:
    with pytest.raises(TypeError, match="join conditions with & and"):
        _ = A and B


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda _: feature("14") > 0.5, r"feature\('14'\) > 0.5: field 'feature'"),
        (lambda _: domain("weather") > 0.5, r"domain\('weather'\) > 0.5: field 'domain'"),
        (lambda _: domain("terror") > 1.5, "threshold.probability"),
        (lambda _: feature("L0/1") > float("nan"), "threshold.activation"),
        (lambda guard: guard.when(feature("L0/1")), "compare it"),
        (lambda guard: guard.when(A, evidence_tokens=0).flag(), "evidence_tokens"),
        (lambda guard: guard.when(A, scope=("answer",)).flag(), "scope"),
        (lambda guard: guard.when(A).clamp(99), "clamp: field 'value'"),
        (lambda guard: guard.when(A).add(-99), "add: field 'strength'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(guard: Guard, wrong: Callable[[Guard], object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        wrong(guard)


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"all": []},
        {"feature": "L0/1"},
        {"threshold": {"activation": 0.5}},
        {
            "feature": "L0/1",
            "threshold": {"activation": 0.5},
            "any": [{"domain": "terror", "threshold": {"fpr": 0.01}}],
        },
        {"any": [{"feature": "L0/1", "threshold": {"fpr": 0.01}}]},
    ],
)
def test_a_condition_of_another_form_is_refused_with_its_place(tmp_path: Path, when: dict[str, Any]) -> None:
    import yaml

    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump({"rules": [{"when": when, "action": "flag"}]}))
    with pytest.raises(PolicyError, match=r"line \d+, column \d+, field 'rules\.0\.when"):
        Policy.load(path)


def test_a_rule_has_a_condition_or_a_target_but_not_both(tmp_path: Path) -> None:
    rule = {"when": A.model_dump(exclude_none=True), "domain": "terror", "action": "flag"}
    with pytest.raises(ValidationError, match="in place of"):
        Policy.model_validate({"rules": [rule]})


def test_when_gives_a_guard_with_one_rule_more_that_a_file_holds(tmp_path: Path, guard: Guard) -> None:
    ids = [f.id for f in guard.bank.features[:2]]
    condition = (feature(ids[0]) > 0.5) & ((feature(ids[1]) > 0.25) | (domain("terror") > 0.9))
    more = guard.when(condition, scope=("response",), evidence_tokens=2, name="mine").clamp(1.5)
    assert [r.label for r in guard.policy.rules] == ["terror-flag"]
    assert [r.label for r in more.policy.rules] == ["terror-flag", "mine"]
    assert more.policy.version != guard.policy.version
    path = tmp_path / "p.yaml"
    path.write_text(more.policy.to_yaml())
    read = Policy.load(path)
    assert read.rules == more.policy.rules
    assert read.version == more.policy.version
    (rule,) = Monitor(more.bank, read, CPU).streaming_rules.rules[1:]
    assert (rule.rule.steer.op, rule.rule.steer.value, rule.evidence_tokens) == ("clamp", 1.5, 2)
    with pytest.raises(PolicyError, match="both called 'mine'"):
        more.when(condition, name="mine").flag()


def test_a_single_signal_becomes_a_plain_rule(guard: Guard) -> None:
    feature_id = guard.bank.features[3].id
    rule = guard.when(feature(feature_id) > 0.5).ablate().policy.rules[-1]
    assert (rule.feature, rule.when, rule.action, rule.steer.op) == (feature_id, None, "steer", "ablate")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 60), seed=st.integers(0, 50), tokens=st.integers(1, 3), both=st.booleans())
def test_a_joined_rule_fires_streamed_where_its_condition_has_held_for_its_tokens(
    bank_of: MakeBank, n: int, seed: int, tokens: int, both: bool
) -> None:
    bank = bank_of(**VARIED)
    first, second = bank.features[0].id, bank.features[1].id
    parts = (feature(first) > 0.3), (feature(second) > 0.3)
    joined = parts[0] & parts[1] if both else parts[0] | parts[1]
    monitor = Guard(bank, make_policy()).when(joined, evidence_tokens=tokens, name="r").flag()
    watching = Monitor(bank, monitor.policy, CPU)
    acts = torch.rand(n, len(bank.features), generator=torch.Generator().manual_seed(seed))
    held = (acts[:, 0] >= 0.3) & (acts[:, 1] >= 0.3) if both else (acts[:, 0] >= 0.3) | (acts[:, 1] >= 0.3)
    needed = min(tokens, n)
    expected = next((t for t in range(needed - 1, n) if bool(held[t - needed + 1 : t + 1].all())), None)
    state = watching.begin(["s"])
    streamed = [v for token in acts for _, v in watching.observe_step(state, token[None])]
    streamed += [v for _, v in watching.finish(state)]
    segment = torch.zeros(n, dtype=torch.long)
    at_once = watching.apply_rules("prompt", "s", watching.judge(acts, segment), acts, segment, torch.arange(n))
    for found in (streamed, at_once):
        assert [v.token_index for v in found] == ([] if expected is None else [expected])
        assert all({hit.id for hit in v.features} <= {first, second} for v in found)


def test_a_domain_in_a_condition_counts_only_once_its_average_has_settled(bank_of: MakeBank) -> None:
    bank = bank_of(violence=True)
    first = bank.features[0].id
    policy = (
        Guard(bank, make_policy()).when((feature(first) > 0.3) & (domain("violence") > 0.5), name="r").block().policy
    )
    monitor = Monitor(bank, policy, CPU)
    state = monitor.begin(["s"])
    acts = torch.ones(40, len(bank.features))
    (fired,) = [v.token_index for token in acts for _, v in monitor.observe_step(state, token[None])]
    pooling = bank.pooling
    assert fired == pooling.settle_tokens - 1 + pooling.evidence_tokens - 1
    assert state.blocked == [True]
    assert monitor.hold_tokens == pooling.settle_tokens - 1 + pooling.evidence_tokens


def test_a_condition_steers_what_it_names_and_only_that(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires=dict(VARIED))
    first, second = bank.features[0].id, bank.features[5].id
    made = Guard(bank, make_policy()).when((feature(first) > 0.01) | (feature(second) > 0.01)).clamp(3.0)
    (rule,) = Monitor(bank, made.policy, CPU).streaming_rules.rules
    assert rule.columns.tolist() == [0, 5]
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    plain = tiny_model.generate(
        prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with made.attach(tiny_model, tiny_tokenizer) as attached:
        steered = tiny_model.generate(
            prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        (report,) = attached.reports
    assert report.action == "steer"
    assert torch.equal(plain.logits[0], steered.logits[0])  # the prompt itself is read as it is
    assert not torch.equal(plain.logits[1], steered.logits[1])


def test_a_guard_made_of_another_leaves_what_the_first_publishes_until_it_is_attached(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    first = Guard(make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires=dict(VARIED)), make_policy())
    with first.attach(tiny_model, tiny_tokenizer):
        second = first.when(feature(first.bank.features[0].id) > 0.5).flag()
        assert first.policy.version in first.metrics.render().decode()
    with second.attach(tiny_model, tiny_tokenizer):
        assert second.policy.version in first.metrics.render().decode()

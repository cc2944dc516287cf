"""Steering as a request writes it becomes a rule that the bank can be steered by, or a refusal that names it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from feature_bank.bank import Bank
from feature_bank.schema import Pooling
from guard.errors import PolicyError
from guard.steering_request import PREFIX, steering_rule, steering_rules
from tests.guard.conftest import VARIED, MakeBank


@pytest.fixture
def bank(bank_of: MakeBank) -> Bank:
    found = bank_of(**VARIED)
    first, *others = found.features
    return replace(found, features=(first.model_copy(update={"concepts": ["violence/gore"]}), *others))


@pytest.mark.parametrize("item", ["violence=-2.5", "violence/gore=1", "L3/10=clamp:3", "terror=ablate"])
def test_an_item_is_a_rule_on_its_target(bank: Bank, item: str) -> None:
    bound = steering_rule(bank, item)
    assert bound.rule.target == item.partition("=")[0]
    assert bound.rule.label == f"{PREFIX}{item}"
    assert not bound.rule.steer.prompt
    assert steering_rules(bank, [item, item])[1].rule == bound.rule


@pytest.mark.parametrize("item", ["violence", "violence=", "violence=much", "=1", "L1=1", "", "violence=clamp:nan", 3])
def test_what_is_no_steering_is_named(bank: Bank, item: object) -> None:
    with pytest.raises(PolicyError, match=repr(str(item))):
        steering_rule(bank, item)


@pytest.mark.parametrize("item", ["L99/1=2", "violence/nothing=1"])
def test_what_the_bank_does_not_hold_is_named(bank: Bank, item: str) -> None:
    with pytest.raises(PolicyError, match=f"the bank.*{item.partition('=')[0]}"):
        steering_rule(bank, item)


def test_a_bank_that_cuts_activations_off_low_is_steered_all_the_same(bank_of: MakeBank) -> None:
    low = bank_of(pooling=Pooling(window=8, min_tokens=2, ceiling=0.5, evidence_tokens=3), **VARIED)
    assert steering_rule(low, "L3/10=1").rule.feature == "L3/10"

"""Steering changes exactly the chosen sequences and positions, by exactly what the operation says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_bank.bank import Bank, Rows, save_bank
from feature_bank.schema import Heads
from guard.encoder import SelectedEncoder
from guard.heads import DomainHeads
from guard.policy import Steer
from guard.rules import BoundRule, bind_rules
from guard.steering import Steering
from tests.factories import HOOKS, PER_HOOK, make_bank, make_policy

HOOK = HOOKS[0]
F = 2 * PER_HOOK


@pytest.fixture
def bank(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    """A bank whose features are orthogonal and tied, so that each can be set without touching another."""
    draft = make_bank(tmp_path / "draft", tiny_model, tiny_tokenizer, fires={"violence": None})
    d_in = tiny_model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(d_in, d_in)).Q[:PER_HOOK].numpy()
    rows = {
        hook: Rows(W_enc=basis.T, W_dec=basis, b_enc=part.b_enc * 0, threshold=part.threshold * 0 + 1e-3)
        for hook, part in draft.rows.items()
    }
    return save_bank(
        tmp_path / "bank",
        manifest=draft.manifest.model_dump(exclude={"schema_version", "files", "sha256"}),
        features=draft.features,
        heads=Heads(pooling=draft.pooling, heads=draft.heads),  # type: ignore[arg-type]  # keys are domains
        rows=rows,
    )


@pytest.fixture
def encoder(bank: Bank) -> SelectedEncoder:
    return SelectedEncoder(bank, torch.device("cpu"))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, 5, 32)


def rule(bank: Bank, steer: Steer, **target: str) -> BoundRule:
    """A rule that steers a domain, or what else is named, bound to the bank."""
    given = {"threshold": {"activation": 0.5}, **target} if target else {"domain": "violence"}
    policy = make_policy({**given, "action": "steer", "steer": steer.model_dump()})
    heads = DomainHeads(bank)
    return bind_rules(policy, bank, heads, "response", streaming=True).rules[0]


def one(feature: int) -> torch.Tensor:
    chosen = torch.zeros(F, dtype=torch.bool)
    chosen[feature] = True
    return chosen


def applied(steering: Steering, hidden: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    result = steering.apply(HOOK, hidden, positions)
    assert result is not None
    return result


@pytest.mark.parametrize("op", ["add", "clamp", "ablate"])
def test_only_chosen_sequences_and_positions_change(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor, op: Any
) -> None:
    steering = Steering(bank, encoder, 3)
    steering.steer(1, rule(bank, Steer(op=op, strength=2.0, value=3.0)))
    positions = torch.tensor([[True, False, True, False, True]] * 3)
    before = hidden.clone()
    steered = applied(steering, hidden, positions)
    assert torch.equal(hidden, before)  # the model's own tensor is left alone
    changed = torch.zeros(3, 5, dtype=torch.bool)
    changed[1] = positions[1]
    assert torch.equal(steered[~changed], hidden[~changed])
    moved = (steered != hidden).any(-1)
    assert (moved & ~changed).sum() == 0
    assert moved.any()
    everywhere = applied(steering, hidden)
    assert torch.equal(everywhere[[0, 2]], hidden[[0, 2]])
    # As many rows as there are here take another path through a matrix product than fewer do.
    torch.testing.assert_close(everywhere[1, positions[1]], steered[1, positions[1]])


def test_add_moves_by_the_gains_through_the_decoder(bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor) -> None:
    gains = torch.randn(F)
    steering = Steering(bank, encoder, 3)
    steering.add(0, gains)
    for hook in HOOKS:
        expected = gains[encoder.columns[hook]] @ encoder.decoder[hook]
        moved = steering.apply(hook, hidden)
        assert moved is not None
        torch.testing.assert_close(moved[0] - hidden[0], expected.expand(5, -1), atol=1e-5, rtol=1e-4)


def test_policys_add_moves_by_strength_times_the_banks_difference(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    head = bank.heads["violence"]
    steering = Steering(bank, encoder, 3)
    steering.steer(2, rule(bank, Steer(op="add", strength=-1.5)))
    expected = torch.zeros(32)
    for feature, delta in zip(head.features, head.steering, strict=True):
        record = bank.by_id[feature]
        if record.hook_name == HOOK:
            row = [f.id for f in bank.features if f.hook_name == HOOK].index(feature)
            expected += -1.5 * delta * encoder.decoder[HOOK][row]
    moved = applied(steering, hidden)[2] - hidden[2]
    torch.testing.assert_close(moved, expected.expand(5, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [2.5, 0.5])
def test_clamp_sets_the_activation_and_keeps_the_rest(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor, value: float
) -> None:
    steering = Steering(bank, encoder, 3)
    steering.clamp(1, one(4), value)
    steered = applied(steering, hidden)
    before, after = encoder.read(HOOK, hidden[1])[1], encoder.read(HOOK, steered[1])[1]
    # A silent feature's pre-activation is not known to be 0: what is added is the difference to its activation
    active = before[:, 4] > 0
    assert active.any()
    torch.testing.assert_close(after[active, 4], torch.full_like(after[active, 4], value), atol=2e-3, rtol=2e-3)
    others = [i for i in range(PER_HOOK) if i != 4]
    torch.testing.assert_close(after[:, others], before[:, others], atol=5e-3, rtol=5e-3)
    direction = encoder.decoder[HOOK][4]
    error = (steered[1] - hidden[1]) - ((steered[1] - hidden[1]) @ direction)[:, None] * direction
    assert error.norm(dim=1).max() < 1e-2


def test_ablation_takes_the_features_contribution_away(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    steering = Steering(bank, encoder, 3)
    steering.clamp(0, torch.ones(F, dtype=torch.bool), 0.0)
    steered = applied(steering, hidden)
    before = encoder.read(HOOK, hidden[0])[1]
    removed = (before * encoder.scale[encoder.columns[HOOK]]) @ encoder.decoder[HOOK]
    assert (before > 0).any()
    torch.testing.assert_close(hidden[0] - steered[0], removed, atol=1e-5, rtol=1e-4)
    remaining = encoder.read(HOOK, steered[0])[1] * encoder.scale[encoder.columns[HOOK]]
    assert remaining.max() < 5e-3


@pytest.fixture
def directed(bank: Bank, tmp_path: Path) -> Bank:
    """The bank with the last three rows of every hook point as directions that overlap."""
    manifest = bank.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    features, renamed, rows = [], {}, {}
    for i, feature in enumerate(bank.features):
        index = manifest["hook_points"][0]["d_sae"] + i % PER_HOOK
        if i % PER_HOOK >= PER_HOOK - 3:
            update = {"index": index, "id": f"L{feature.layer}/{index}", "direction": f"violence/c{i}", "scale": 0.5}
            feature = feature.model_copy(update=update)
        renamed[bank.features[i].id] = feature.id
        features.append(feature)
    for hook, part in bank.rows.items():
        weight, bias, threshold = part.W_enc.copy(), part.b_enc.copy(), part.threshold.copy()
        weight[:, -3:] += weight[:, -3:].sum(1)[:, None]
        weight[:, -3:] /= np.linalg.norm(weight[:, -3:], axis=0)
        bias[-3:], threshold[-3:] = 0.3, 0.0
        rows[hook] = Rows(W_enc=weight, W_dec=part.W_dec, b_enc=bias, threshold=threshold)
    for hook in manifest["hook_points"]:
        hook["n_directions"] = 3
    canary = manifest["canary"]["activations"]
    manifest["canary"]["activations"] = {renamed[name]: value for name, value in canary.items()}
    heads = {
        d: head.model_copy(update={"features": [renamed[f] for f in head.features]}) for d, head in bank.heads.items()
    }
    return save_bank(
        tmp_path / "directed",
        manifest=manifest,
        features=features,
        heads=Heads(pooling=bank.pooling, heads=heads),
        rows=rows,
    )


def readings(bank: Bank, hidden: torch.Tensor) -> torch.Tensor:
    """(n, 3) what the three directions of the first hook point read, in units of their scales."""
    part = bank.rows[HOOK]
    scale = torch.tensor([f.scale for f in bank.features[PER_HOOK - 3 : PER_HOOK]])
    return (hidden @ torch.from_numpy(part.W_enc[:, -3:]) + torch.from_numpy(part.b_enc[-3:])) / scale


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5])
def test_directions_that_overlap_are_clamped_together(
    directed: Bank, hidden: torch.Tensor, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.steering.DAMPING", 1e-6)
    steering = Steering(directed, SelectedEncoder(directed, torch.device("cpu")), 3)
    chosen = torch.zeros(F, dtype=torch.bool)
    chosen[PER_HOOK - 3 : PER_HOOK] = True
    steering.clamp(1, chosen, value)
    steered = applied(steering, hidden)
    assert torch.equal(steered[[0, 2]], hidden[[0, 2]])
    before, after = readings(directed, hidden[1]), readings(directed, steered[1])
    expected = torch.full_like(before, value) if value > 0 else before.clamp_max(value)
    assert (before > value).any()
    torch.testing.assert_close(after, expected, atol=2e-3, rtol=1e-3)
    # Nothing moves that the readings do not ask for
    rows = torch.linalg.qr(torch.from_numpy(directed.rows[HOOK].W_enc[:, -3:])).Q
    moved = steered[1] - hidden[1]
    torch.testing.assert_close(moved, moved @ rows @ rows.T, atol=2e-3, rtol=1e-3)


def test_directions_that_read_nothing_are_left_bit_for_bit(directed: Bank) -> None:
    weight = torch.from_numpy(directed.rows[HOOK].W_enc[:, -3:])
    silent = -10 * weight.sum(1).expand(3, 5, -1).contiguous()
    steering = Steering(directed, SelectedEncoder(directed, torch.device("cpu")), 3)
    chosen = torch.zeros(F, dtype=torch.bool)
    chosen[PER_HOOK - 3 : PER_HOOK] = True
    steering.clamp(0, chosen, 0.0)
    assert (readings(directed, silent[0]) < 0).all()
    assert torch.equal(applied(steering, silent), silent)


def test_of_a_domain_those_features_are_clamped_that_steer_it(bank: Bank, encoder: SelectedEncoder) -> None:
    head = bank.heads["violence"]
    chosen = torch.tensor(
        [dict(zip(head.features, head.steering, strict=True)).get(f.id, 0) > 0 for f in bank.features]
    )
    assert chosen.any()
    hidden = torch.randn(3, 5, 32)
    by_rule, by_hand = Steering(bank, encoder, 3), Steering(bank, encoder, 3)
    by_rule.steer(1, rule(bank, Steer(op="clamp", value=2.0)))
    by_hand.clamp(1, chosen, 2.0)
    for hook in HOOKS:
        found, expected = by_rule.apply(hook, hidden), by_hand.apply(hook, hidden)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.equal(found, expected)


def test_ablating_a_silent_feature_changes_no_bit(bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor) -> None:
    steering = Steering(bank, encoder, 3)
    steering.clamp(0, one(2), 0.0)
    silent = encoder.read(HOOK, hidden[0])[1][:, 2] == 0
    assert silent.any()
    assert torch.equal(applied(steering, hidden)[0, silent], hidden[0, silent])


def test_a_rule_on_a_feature_or_concept_steers_that_and_nothing_else(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    record = bank.features[2]
    added = Steering(bank, encoder, 3)
    added.steer(0, rule(bank, Steer(op="add", strength=-2.0), feature=record.id))
    expected = torch.zeros(F)
    expected[2] = -2.0 * record.scale
    by_hand = Steering(bank, encoder, 3)
    by_hand.add(0, expected)
    assert torch.equal(applied(added, hidden), applied(by_hand, hidden))
    clamped = Steering(bank, encoder, 3)
    clamped.steer(1, rule(bank, Steer(op="clamp", value=1.5), feature=record.id))
    by_hand = Steering(bank, encoder, 3)
    by_hand.clamp(1, one(2), 1.5)
    assert torch.equal(applied(clamped, hidden), applied(by_hand, hidden))


@pytest.mark.parametrize("op", ["add", "clamp"])
def test_what_is_released_is_as_if_it_had_never_been_asked_for(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor, op: Any
) -> None:
    going, staying = rule(bank, Steer(op=op, strength=2.0, value=3.0)), rule(bank, Steer(), feature=bank.features[1].id)
    expected, steering = Steering(bank, encoder, 3), Steering(bank, encoder, 3)
    expected.steer(1, staying)
    expected.steer(2, going)
    for row in (1, 2):
        steering.steer(row, going)
    steering.steer(1, staying)
    steering.release(1, going)
    steering.release(0, going)  # it never was
    assert torch.equal(applied(steering, hidden), applied(expected, hidden))
    steering.release(2, going)
    steering.release(1, staying)
    assert all(steering.apply(hook, hidden) is None for hook in HOOKS)


def test_steering_that_two_rules_ask_for_stays_until_both_are_released(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    first = rule(bank, Steer())
    second = first._replace(rule=first.rule.model_copy(update={"name": "other"}))
    steering = Steering(bank, encoder, 3)
    steering.steer(0, first)
    once = applied(steering, hidden)
    steering.steer(0, second)
    assert torch.equal(applied(steering, hidden), once)
    steering.release(0, first)
    assert torch.equal(applied(steering, hidden), once)
    steering.release(0, second)
    assert all(steering.apply(hook, hidden) is None for hook in HOOKS)


def test_zero_gains_touch_nothing(bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor) -> None:
    steering = Steering(bank, encoder, 3)
    steering.add(0, torch.zeros(F))
    steering.steer(1, rule(bank, Steer(op="add", strength=0.0)))
    steering.clamp(2, torch.zeros(F, dtype=torch.bool), 5.0)
    assert not steering.active
    assert all(steering.apply(hook, hidden) is None for hook in HOOKS)


def test_positions_that_hold_no_steered_sequence_touch_nothing(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    steering = Steering(bank, encoder, 3)
    steering.steer(1, rule(bank, Steer()))
    positions = torch.ones(3, 5, dtype=torch.bool)
    positions[1] = False
    assert steering.apply(HOOK, hidden, positions) is None


def test_same_steering_twice_is_in_force_once(bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor) -> None:
    once, twice = Steering(bank, encoder, 3), Steering(bank, encoder, 3)
    once.steer(0, rule(bank, Steer()))
    for _ in range(2):
        twice.steer(0, rule(bank, Steer()))
    assert torch.equal(applied(once, hidden), applied(twice, hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_dtype_is_kept(bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor, dtype: torch.dtype) -> None:
    steering = Steering(bank, encoder, 3)
    steering.steer(1, rule(bank, Steer()))
    steered = applied(steering, hidden.to(dtype))
    assert steered.dtype == dtype
    assert torch.equal(steered[[0, 2]], hidden.to(dtype)[[0, 2]])


@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_a_change_is_no_longer_than_the_limit_allows_and_keeps_its_direction(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor, limit: float
) -> None:
    free, held = Steering(bank, encoder, 3), Steering(bank, encoder, 3)
    free.steer(0, rule(bank, Steer(op="clamp", value=9.0, limit=10.0)))
    held.steer(0, rule(bank, Steer(op="clamp", value=9.0, limit=limit)))
    wanted, got = applied(free, hidden)[0] - hidden[0], applied(held, hidden)[0] - hidden[0]
    allowed = limit * hidden[0].norm(dim=1)
    assert (wanted.norm(dim=1) > allowed).any()
    torch.testing.assert_close(got.norm(dim=1), torch.minimum(wanted.norm(dim=1), allowed), rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(wanted, got).min() > 0.9999


def test_the_tightest_limit_holds_a_sequence_until_it_is_released(
    bank: Bank, encoder: SelectedEncoder, hidden: torch.Tensor
) -> None:
    wide, tight = Steer(op="add", strength=9.0, limit=2.0), Steer(op="add", strength=9.0, limit=0.2)
    both = Steering(bank, encoder, 3)
    both.steer(0, rule(bank, wide))
    alone = applied(both, hidden)
    both.steer(0, rule(bank, tight, feature=bank.features[0].id))
    assert ((applied(both, hidden) - hidden)[0].norm(dim=1) <= 0.2001 * hidden[0].norm(dim=1)).all()
    both.release(0, rule(bank, tight, feature=bank.features[0].id))
    assert torch.equal(applied(both, hidden), alone)

"""Rows of one pass are steered each by its own program, as its request alone would be; no other row changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from feature_bank.bank import Bank, save_bank
from feature_bank.schema import Heads
from guard.encoder import SelectedEncoder
from guard.engines.vllm.programs import Batch, Programs, RuleKey
from guard.errors import GuardError, PolicyError
from guard.heads import DomainHeads
from guard.rules import BoundRule, bind_rules
from guard.steering import Steering
from tests.factories import HOOKS, PER_HOOK, make_bank, make_policy

CPU = torch.device("cpu")
HOOK = HOOKS[0]
ROWS = 24
ADD = {"domain": "violence", "steer": {"op": "add", "strength": 3.0, "limit": 0.5}, "name": "add"}
CLAMP = {"steer": {"op": "clamp", "value": 2.0}, "threshold": {"activation": 0.5}, "name": "clamp"}
ABLATE = {"domain": "terror", "steer": {"op": "ablate"}, "name": "ablate"}
BACK = {"domain": "violence", "steer": {"op": "add", "strength": -1.0}, "name": "back"}
KEYS: dict[str, RuleKey] = {rule["name"]: ("", rule["name"]) for rule in (ADD, CLAMP, ABLATE, BACK)}  # type: ignore[misc]


@pytest.fixture(params=["features of an SAE", "directions"])
def bank(request: Any, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    draft = make_bank(tmp_path / "draft", tiny_model, tiny_tokenizer, fires={"violence": None, "terror": None})
    if request.param != "directions":
        return draft
    manifest = draft.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    renamed: dict[str, str] = {}
    features = []
    for i, feature in enumerate(draft.features):
        index = 128 + i % PER_HOOK
        renamed[feature.id] = f"L{feature.layer}/{index}"
        update = {"index": index, "id": renamed[feature.id], "direction": f"violence/c{i}"}
        features.append(feature.model_copy(update=update))
    for hook in manifest["hook_points"]:
        hook["n_directions"] = PER_HOOK
    recorded = manifest["canary"]["activations"]
    manifest["canary"]["activations"] = {renamed[name]: value for name, value in recorded.items()}
    heads = {
        d: head.model_copy(update={"features": [renamed[f] for f in head.features]}) for d, head in draft.heads.items()
    }
    return save_bank(
        tmp_path / "bank",
        manifest=manifest,
        features=features,
        heads=Heads(pooling=draft.pooling, heads=heads),  # type: ignore[arg-type]  # keys are domains
        rows=dict(draft.rows),
    )


@pytest.fixture
def rules(bank: Bank) -> dict[RuleKey, BoundRule]:
    clamp = {**CLAMP, "feature": bank.features[0].id}
    policy = make_policy(*({**rule, "action": "steer"} for rule in (ADD, clamp, ABLATE, BACK)))
    table = bind_rules(policy, bank, DomainHeads(bank), "response", streaming=True)
    return {("", bound.rule.label): bound for bound in table.rules}


@pytest.fixture
def encoder(bank: Bank) -> SelectedEncoder:
    return SelectedEncoder(bank, CPU)


def make_programs(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule], *, capacity: int = 4, captured: bool = False
) -> Programs:
    programs = Programs(bank, encoder, rules.__getitem__, rows=ROWS, capacity=capacity)
    if captured:  # as on a device whose graphs are captured
        programs._captured = True
        programs._steering = Steering(bank, encoder, capacity + 1, fixed=True)
    return programs


def batch(**parts: tuple[int, int]) -> Batch:
    """A pass of requests, each with its first position and its number of rows."""
    edges = np.cumsum([0, *(n for _, n in parts.values())])
    first = np.array([at for at, _ in parts.values()])
    return Batch(list(parts), edges, first, np.zeros(edges[-1], dtype=np.int64))


def alone(
    bank: Bank, encoder: SelectedEncoder, bound: list[BoundRule], hidden: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """What steering that is in force on one sequence makes of its rows."""
    steering = Steering(bank, encoder, 1)
    for rule in bound:
        steering.steer(0, rule)
    return hidden + steering.change(HOOK, seen, torch.zeros(len(seen), dtype=torch.int64))


@pytest.mark.parametrize("captured", [False, True])
def test_requests_of_one_pass_are_steered_as_each_alone(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule], captured: bool
) -> None:
    programs = make_programs(bank, encoder, rules, captured=captured)
    programs.change("a", 0, [KEYS["add"]])
    programs.change("b", 3, [KEYS["clamp"], KEYS["ablate"]])
    programs.change("d", 0, [KEYS["back"], KEYS["clamp"]])
    programs.log = []
    programs.place(batch(a=(7, 1), b=(0, 6), c=(2, 4), d=(11, 1)))
    hidden, residual = torch.randn(12, 32), torch.randn(12, 32)
    seen, before = hidden + residual, hidden.clone()
    programs.steer(HOOK, hidden, seen)
    wanted = {(0, 1): ["add"], (4, 7): ["clamp", "ablate"], (11, 12): ["back", "clamp"]}
    steered = torch.zeros(12, dtype=torch.bool)
    for (start, stop), names in wanted.items():
        expected = alone(bank, encoder, [rules[KEYS[n]] for n in names], before[start:stop], seen[start:stop])
        torch.testing.assert_close(hidden[start:stop], expected, atol=1e-5, rtol=1e-5)
        assert (hidden[start:stop] != before[start:stop]).any(1).all()
        steered[start:stop] = True
    assert torch.equal(hidden[~steered], before[~steered])
    assert programs.log == [("a", 7), ("b", 3), ("b", 4), ("b", 5), ("d", 11)]
    assert programs.requests == {"a", "b", "d"}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_steered_keep_their_bits(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule], dtype: torch.dtype, captured: bool
) -> None:
    programs = make_programs(bank, encoder, rules, captured=captured)
    programs.change("a", 5, [KEYS["clamp"]])
    hidden = torch.randn(8, 32).to(dtype)
    hidden[0], hidden[1] = torch.nan, -0.0
    before = hidden.clone()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    programs.place(batch(b=(0, 3), a=(3, 3)))  # two rows more are padding
    programs.steer(HOOK, hidden, hidden.clone())
    changed = (hidden.view(bits) != before.view(bits)).any(1)
    assert changed.tolist() == [False] * 5 + [True, False, False]
    programs.place(batch(b=(3, 8)))
    before = hidden.clone()
    programs.steer(HOOK, hidden, hidden.clone())
    assert torch.equal(hidden.view(bits), before.view(bits))


def test_what_changes_holds_from_its_position_on_however_often_a_position_is_read(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule]
) -> None:
    """A request that was preempted is read again from its start: each row by what was in force there."""
    programs = make_programs(bank, encoder, rules)
    programs.change("a", 4, [KEYS["add"]])
    programs.change("a", 6, [])
    programs.change("a", 9, [KEYS["add"], KEYS["clamp"]])
    hidden = torch.randn(12, 32)
    whole = hidden.clone()
    programs.place(batch(a=(0, 12)))
    programs.steer(HOOK, whole, hidden)
    changed = (whole != hidden).any(1).tolist()
    assert changed == [at in (4, 5, 9, 10, 11) for at in range(12)]
    for at in range(12):
        one = hidden[at : at + 1].clone()
        programs.place(batch(a=(at, 1)))
        programs.steer(HOOK, one, one.clone())
        torch.testing.assert_close(one[0], whole[at], atol=1e-5, rtol=1e-5)


def test_requests_with_the_same_rules_share_a_program_and_it_is_used_again_when_all_have_ended(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule]
) -> None:
    programs = make_programs(bank, encoder, rules, capacity=2)
    for n in range(20):
        programs.change(f"r{n}", 0, [KEYS["add"]] if n % 2 else [KEYS["clamp"], KEYS["add"]])
        programs.change(f"r{n}", 4, [])
        programs.change(f"r{n}", 5, [KEYS["add"], KEYS["clamp"]])
    with pytest.raises(GuardError, match="SAILGUARD_STEERING_PROGRAMS"):
        programs.change("more", 0, [KEYS["ablate"]])
    programs.drop([f"r{n}" for n in range(2, 20)])
    with pytest.raises(GuardError, match="more"):
        programs.change("more", 0, [KEYS["ablate"], KEYS["back"]])
    programs.drop(["r0", "r1", "never steered"])
    for keys in (["ablate"], ["ablate", "back"]):
        programs.change("more", 0, [KEYS[k] for k in keys])
    assert programs.requests == {"more"}


@pytest.mark.parametrize("captured", [False, True])
def test_a_program_that_is_used_again_keeps_nothing_of_its_last_rules(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule], captured: bool
) -> None:
    programs = make_programs(bank, encoder, rules, capacity=1, captured=captured)
    hidden = torch.randn(3, 32)
    for names in (["ablate", "add"], ["clamp"], ["back"], ["ablate", "add"]):
        programs.change("a", 0, [KEYS[n] for n in names])
        steered = hidden.clone()
        programs.place(batch(a=(0, 3)))
        programs.steer(HOOK, steered, hidden)
        expected = alone(bank, encoder, [rules[KEYS[n]] for n in sorted(names)], hidden, hidden)
        torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
        programs.drop(["a"])


def test_a_rule_that_cannot_be_found_leaves_nothing_behind(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule]
) -> None:
    """What a request asks for may not be in the bank: that is its own affair, each time that it asks."""

    def find(key: RuleKey) -> BoundRule:
        if key not in rules:
            raise PolicyError("not in the bank")
        return rules[key]

    programs = Programs(bank, encoder, find, rows=ROWS, capacity=1)
    for _ in range(2):
        with pytest.raises(PolicyError):
            programs.change("a", 0, [KEYS["add"], ("z", "unknown")])
    assert programs.requests == frozenset()
    programs.change("b", 0, [KEYS["add"]])


def test_a_captured_pass_replays_what_is_in_force_later(
    bank: Bank, encoder: SelectedEncoder, rules: dict[RuleKey, BoundRule]
) -> None:
    """Traced without looking at any value, as a graph is captured; afterwards only the tables change."""
    programs = make_programs(bank, encoder, rules, captured=True)

    def body(hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        programs.steer(HOOK, hidden, seen)
        return hidden

    example = torch.zeros(10, 32)
    graph = make_fx(body, tracing_mode="fake", _allow_non_fake_inputs=True)(example, example.clone())
    hidden = torch.randn(10, 32)
    for names in (["add"], ["clamp", "ablate"], ["back"]):
        programs.change("b", 2, [KEYS[n] for n in names])
        programs.place(batch(a=(0, 3), b=(0, 5)))
        replayed, expected = hidden.clone(), hidden.clone()
        graph(replayed, hidden)
        expected[5:8] = alone(bank, encoder, [rules[KEYS[n]] for n in sorted(names)], hidden[5:8], hidden[5:8])
        torch.testing.assert_close(replayed, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(replayed[:5], hidden[:5])
        programs.drop(["b"])
    programs.place(batch(a=(0, 10)))
    untouched = hidden.clone()
    graph(untouched, hidden)
    assert torch.equal(untouched, hidden)

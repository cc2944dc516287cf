"""A difference names all that differs, in the right direction, and nothing else."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import Bank
from feature_bank.difference import BankDifference, Change, FeatureLine, ThresholdMove, compare_banks
from tests.factories import HOOKS, PER_HOOK, make_bank
from tests.feature_bank.variants import write_variant

EMPTY: dict[str, Any] = dict.fromkeys(("features_in", "features_out", "admitted", "heads", "thresholds"), ())
EMPTY |= {"quality": (), "model": (), "hook_points": (), "origin": (), "relabelled": {}, "remeasured": {}}


@pytest.fixture
def bank(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    return make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)


def found_in(difference: BankDifference) -> dict[str, Any]:
    """The parts of a difference that are not empty."""
    values = {field.name: getattr(difference, field.name) for field in fields(difference)}
    return {name: value for name, value in values.items() if name in EMPTY and value != EMPTY[name]}


def test_a_bank_does_not_differ_from_itself(bank: Bank, tmp_path: Path) -> None:
    for other in (bank, Bank.load(tmp_path / "bank"), write_variant(bank, tmp_path / "copy")):
        found = compare_banks(bank, other)
        assert found.same
        assert found_in(found) == {}


def test_the_other_way_round_is_the_reverse(bank: Bank, tmp_path: Path) -> None:
    other = write_variant(
        bank,
        tmp_path / "b",
        version="2",
        features=lambda f: {"domains": ["terror"], "admitted": False} if f.id == "L1/3" else {},
        heads=lambda d, h: {"bias": h.bias + 1.0, "weights": [w + 0.5 for w in h.weights]},
        quality={"auroc": 0.9},
    )
    there, back = compare_banks(bank, other), compare_banks(other, bank)
    assert not there.same
    for name in ("admitted", "quality", "origin"):
        turned = [Change(name=c.name, before=c.after, after=c.before) for c in getattr(there, name)]
        assert turned == list(getattr(back, name))
    assert set(found_in(there)) == {"relabelled", "admitted", "heads", "quality", "origin"}


def test_each_part_is_named_with_its_values(bank: Bank, tmp_path: Path) -> None:
    moved = {"0.001": 0.9, "0.01": 0.75, "0.2": 0.1}
    other = write_variant(
        bank,
        tmp_path / "b",
        version="2",
        features=lambda f: (
            {"explanation": "new", "concepts": ["election_campaign"], "density": 0.5, "scores": {"auroc_politics": 0.9}}
            if f.id == "L1/10"
            else {}
        ),
        heads=lambda d, h: (
            {
                "features": h.features[1:],
                "weights": [h.weights[1] + 2.0, *h.weights[2:]],
                "steering": h.steering[1:],
                "thresholds": moved,
            }
            if d == "politics"
            else {}
        ),
    )
    found = compare_banks(bank, other)
    old = bank.by_id["L1/10"]
    assert found.relabelled == {
        "L1/10": (
            Change(name="concepts", before=[], after=["election_campaign"]),
            Change(name="explanation", before=old.explanation, after="new"),
        )
    }
    assert found.remeasured == {"density": 1, "scores": 1}
    (head,) = found.heads
    assert (head.domain, head.features_out, head.features_in, head.others) == ("politics", ("L1/10",), (), ())
    before = bank.heads["politics"]
    assert head.weights == (Change(name=before.features[1], before=before.weights[1], after=before.weights[1] + 2.0),)
    assert found.thresholds == (
        ThresholdMove(domain="politics", kind="whole", rate="0.01", before=0.7, after=0.75),
        ThresholdMove(domain="politics", kind="whole", rate="0.05", before=0.5, after=None),
        ThresholdMove(domain="politics", kind="whole", rate="0.2", before=None, after=0.1),
    )
    assert [change.name for change in found.origin] == ["version"]


def test_features_of_another_sae_are_other_features(bank: Bank, tmp_path: Path) -> None:
    hooks = [hook.model_dump() for hook in bank.manifest.hook_points]
    hooks[0] |= {"sae_sha256": "0" * 64, "fvu": 0.2}
    found = compare_banks(bank, write_variant(bank, tmp_path / "b", hook_points=hooks))
    ids = [feature.id for feature in bank.features if feature.hook_name == HOOKS[0]]
    assert [line.id for line in found.features_in] == [line.id for line in found.features_out] == ids
    assert len(ids) == PER_HOOK
    first = bank.features[0]
    assert found.features_out[0] == FeatureLine(
        id=first.id, domains=tuple(first.domains), explanation=first.explanation
    )
    assert [change.name for change in found.hook_points] == [f"{HOOKS[0]}.sae_sha256", f"{HOOKS[0]}.fvu"]


def test_hook_points_and_domains_that_only_one_bank_has_are_named(
    bank: Bank, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    other = make_bank(tmp_path / "b", tiny_model, tiny_tokenizer, hooks=HOOKS[:1])
    found = compare_banks(bank, other)
    assert len(found.features_out) == PER_HOOK
    assert found.features_in == ()
    assert Change(name=HOOKS[1], before="present", after=None) in found.hook_points
    fewer = write_variant(bank, tmp_path / "c", model=bank.manifest.model.model_dump() | {"id": "other"})
    assert compare_banks(bank, fewer).model == (Change(name="id", before="tiny-llama", after="other"),)

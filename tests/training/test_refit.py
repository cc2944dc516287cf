"""Reviews carried out: rejected features are gone, labels are the reviewers', and all else is as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import Bank
from feature_bank.errors import DataError
from feature_bank.identity import identify
from feature_bank.review import append_reviews, load_reviews, pending
from feature_bank.review import effective as effective_labels
from feature_bank.verdicts import Draft, Overrides
from guard import Guard
from tests.factories import make_policy
from tests.training.workshop import OTHERS, POLITICS, Trained, Workshop
from training.pipeline import load_preset
from training.refit import next_version, refit_bank


@pytest.fixture
def reviewed(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained bank that reviews can be added to."""
    return Path(shutil.copytree(trained.out, tmp_path / "reviewed"))


def refit(workshop: Workshop, trained: Trained, source: Path, out: Path, **changes: Any) -> Bank:
    return refit_bank(
        source,
        model=workshop.model,
        tokenizer=workshop.tokenizer,
        identity=identify(workshop.model, workshop.tokenizer, "tiny"),
        preset=load_preset(str(workshop.write_preset(**changes))),
        data=workshop.data,
        work=trained.work,
        out=out,
        report=lambda *_: None,
    )


def review(folder: Path, verdict: Any, feature: str, **overrides: Any) -> None:
    draft = Draft(
        feature=feature,
        verdict=verdict,
        overrides=Overrides(**overrides),
        reviewer="an analyst",
        reason="a reason",
    )
    append_reviews(folder, [draft])


def weights(bank: Bank) -> dict[str, float]:
    head = bank.heads["politics"]
    return dict(zip(head.features, head.weights, strict=True))


def test_a_rejected_feature_leaves_rows_records_and_heads_and_the_guard_takes_the_rest(
    workshop: Workshop, trained: Trained, reviewed: Path, tmp_path: Path
) -> None:
    before = weights(trained.bank)
    gone = max(before, key=lambda name: before[name])
    review(reviewed, "reject", gone)
    bank = refit(workshop, trained, reviewed, tmp_path / "next")
    assert gone not in bank.by_id
    assert gone not in bank.heads["politics"].features
    assert set(bank.by_id) <= set(trained.bank.by_id) - {gone}
    assert bank.manifest.parent == trained.bank.version
    assert bank.manifest.version != trained.bank.manifest.version
    assert [r.feature for r in load_reviews(tmp_path / "next").reviews] == [gone]
    policy = make_policy({"domain": "politics", "scope": ["prompt", "response"], "action": "flag"})
    with Guard.from_bank(tmp_path / "next", policy=policy).attach(workshop.model, workshop.tokenizer) as attached:
        present, absent = attached.score([" ".join(POLITICS), " ".join(OTHERS)], ["passage", "passage"])
    assert present.scores["politics"] > absent.scores["politics"]


def test_without_a_rejection_heads_thresholds_and_rows_come_out_the_same(
    workshop: Workshop, trained: Trained, reviewed: Path, tmp_path: Path
) -> None:
    bank = refit(workshop, trained, reviewed, tmp_path / "next")
    assert bank.heads == trained.bank.heads
    assert bank.features == trained.bank.features
    assert (tmp_path / "next" / "weights.safetensors").read_bytes() == (
        trained.out / "weights.safetensors"
    ).read_bytes()


def test_labels_are_those_of_the_reviews_and_none_is_pending_afterwards(
    workshop: Workshop, trained: Trained, reviewed: Path, tmp_path: Path
) -> None:
    name = next(f.id for f in trained.bank.features if f.domains)
    review(reviewed, "relabel", name, domains=[], explanation="Words of a game.")
    bank = refit(workshop, trained, reviewed, tmp_path / "next")
    record = bank.by_id[name]
    assert record.domains == []
    assert record.explanation == "Words of a game."
    assert record.explainer is not None
    assert record.explainer.method == "reviewer"
    assert record.predicate is None
    assert record.fidelity == []  # nobody has put these words to the test
    assert len(pending(bank, effective_labels(bank, load_reviews(tmp_path / "next").reviews))) == 0


def test_a_bank_of_another_run_and_one_with_everything_rejected_are_refused(
    workshop: Workshop, trained: Trained, reviewed: Path, tmp_path: Path
) -> None:
    workshop.train(tmp_path / "other", tmp_path / "other.work", sae={"expansion": 4, "k": 5, "batch_tokens": 256})
    with pytest.raises(DataError, match="holds other SAEs"):
        refit(workshop, trained, tmp_path / "other", tmp_path / "next")
    for feature in trained.bank.features:
        review(reviewed, "reject", feature.id)
    with pytest.raises(DataError, match=r"domain|features are left"):
        refit(workshop, trained, reviewed, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_a_folder_that_no_run_has_worked_in_is_refused_before_anything_is_read(
    workshop: Workshop, trained: Trained, reviewed: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no work folder of a training run"):
        refit(workshop, trained._replace(work=tmp_path / "none"), reviewed, tmp_path / "next")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("version", "expected"), [("0.2.0", "0.2.1"), ("1", "2"), ("2.9", "2.10"), ("1.0-rc1", "1.0-rc2"), ("x", "x.1")]
)
def test_the_next_version_raises_the_last_number(version: str, expected: str) -> None:
    assert next_version(version) == expected

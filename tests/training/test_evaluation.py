"""Measures against values that can be counted by hand."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from feature_bank.errors import MissingExtraError
from feature_bank.schema import Calibration, HeadRecord
from training.evaluation import measure, measure_domains


@dataclass(frozen=True)
class Labels:
    """A document of which only some labels are known."""

    known: dict[str, bool]

    def label(self, domain: str) -> bool | None:
        return self.known.get(domain)


def head(**thresholds: float) -> HeadRecord:
    return HeadRecord(
        features=["L0/0"],
        weights=[1.0],
        bias=0.0,
        calibration=Calibration(slope=1.0, intercept=0.0),
        thresholds=thresholds,
        streaming_thresholds=thresholds,
        steering=[0.0],
    )


def test_scores_that_separate_the_classes_measure_one() -> None:
    found = measure([True, True, False, False], [0.9, 0.8, 0.2, 0.1], 0.5)
    assert (found.n, found.positives, found.auroc, found.auprc) == (4, 2, 1.0, 1.0)
    assert found.tpr_at_fpr == {"0.01": 1.0, "0.05": 1.0}
    assert found.operating_point is not None
    assert (found.operating_point.tpr, found.operating_point.fpr) == (1.0, 0.0)


def test_scores_that_say_nothing_measure_chance() -> None:
    found = measure([True] * 30 + [False] * 70, [0.5] * 100)
    assert (found.auroc, found.auprc, found.tpr_at_fpr["0.05"]) == (0.5, 0.3, 0.0)
    assert found.operating_point is None


def test_the_tpr_at_an_fpr_allows_exactly_that_share_of_false_positives() -> None:
    negatives = [i / 100 for i in range(100)]  # 0.00 ... 0.99
    positives = [0.955, 0.985, 0.995, 0.5]
    found = measure([False] * 100 + [True] * 4, negatives + positives)
    # one false positive in a hundred reaches down to 0.99, five to 0.95
    assert found.tpr_at_fpr == {"0.01": 0.5, "0.05": 0.75}


def test_a_score_at_the_threshold_counts_as_above_it() -> None:
    point = measure([True, False], [0.5, 0.5], 0.5).operating_point
    assert point is not None
    assert (point.tpr, point.fpr) == (1.0, 1.0)


@pytest.mark.parametrize("labels", [[], [True, True], [False, False]])
def test_what_one_class_alone_cannot_show_is_none(labels: list[bool]) -> None:
    found = measure(labels, [0.5] * len(labels), 0.4)
    assert (found.auroc, found.auprc) == (None, None)
    assert set(found.tpr_at_fpr.values()) == {None}
    assert found.operating_point is not None
    assert (found.operating_point.tpr is None) == (True not in labels)
    assert (found.operating_point.fpr is None) == (False not in labels)


def test_a_domain_is_measured_where_its_label_is_known() -> None:
    documents = [Labels({"terror": True}), Labels({"terror": False, "politics": True}), Labels({})]
    scores = [
        {"terror": 0.9, "politics": 0.9},
        {"terror": 0.1, "politics": 0.9},
        {"terror": 1.0, "politics": 1.0},
    ]
    found = measure_domains(documents, scores, {"terror": head(**{"0.01": 0.5}), "politics": head()})
    assert (found["terror"].n, found["terror"].positives, found["terror"].auroc) == (2, 1, 1.0)
    assert (found["politics"].n, found["politics"].positives) == (1, 1)
    assert found["politics"].operating_point is None


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"sailguard\[train\]"):
        measure([True, False], [0.9, 0.1])

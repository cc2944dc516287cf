"""Heads with no more features than they need: within the tolerance of the large one, and only of what is allowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_bank.errors import DataError
from tests.training.samples import document
from training.corpus import OWN_SOURCE, Document
from training.discovery import auroc, labels
from training.heads import FittedHead, fit_heads, fit_small_heads

HOOK = "blocks.0.hook_resid_post"


def corpus() -> list[Document]:
    return [
        document(
            f"text {i}",
            domains=["terror"] if i % 2 else [],
            known=["terror"],
            split="calibration" if i % 5 == 0 else "discovery",
        )
        for i in range(600)
    ]


def pooled(planted: float) -> dict[str, np.ndarray]:
    """Forty features that each know a little, and one that knows `planted`."""
    generator = np.random.default_rng(0)
    values = generator.random((600, 60)) + np.outer(np.arange(600) % 2, np.repeat([0.15, 0.0], [40, 20]))
    values[1::2, 7] += planted
    return {HOOK: values.astype(np.float16)}


def held_out(head: FittedHead, matrix: dict[str, np.ndarray], documents: list[Document]) -> float:
    rows, y = labels(documents, "terror", ("calibration",))
    return float(
        auroc(matrix[HOOK][np.ix_(rows, [i for _, i in head.features])].astype(np.float32) @ head.weights, y)[0]
    )


@pytest.mark.parametrize("planted", [0.0, 3.0])
def test_fewer_features_cost_no_more_than_the_tolerance(planted: float) -> None:
    documents, matrix = corpus(), pooled(planted)
    large = fit_heads(matrix, documents, candidates=60, max_features=32, report=lambda *_: None)["terror"]
    small = fit_small_heads(matrix, documents, candidates=60, max_features=32, tolerance=0.01, report=lambda *_: None)[
        "terror"
    ]
    assert held_out(small, matrix, documents) >= held_out(large, matrix, documents) - 0.01
    assert len(small.features) <= len(large.features)
    if planted:
        assert len(small.features) == 8  # the one that knows it all is among the fewest that are tried


def test_without_tolerance_nothing_is_left_out_and_only_allowed_features_are_used() -> None:
    documents, matrix = corpus(), pooled(3.0)
    allowed = {(HOOK, i) for i in range(10, 30)}
    found = fit_small_heads(
        matrix, documents, candidates=60, max_features=12, tolerance=0.0, report=lambda *_: None, allowed=allowed
    )["terror"]
    assert len(found.features) == 12
    assert set(found.features) <= allowed


def test_no_allowed_feature_is_an_error_that_says_so() -> None:
    with pytest.raises(DataError, match="no domain"):
        fit_small_heads(
            pooled(1.0), corpus(), candidates=9, max_features=4, tolerance=0.1, report=lambda *_: None, allowed=set()
        )


def test_the_projects_own_pairs_count_as_much_as_all_other_text() -> None:
    """Other text gives its label away by one feature; the pairs need many that each know a little."""
    generator = np.random.default_rng(3)
    documents = [
        document(
            f"text {i}",
            domains=["terror"] if i % 2 else [],
            known=["terror"],
            source=OWN_SOURCE if i >= 1000 else "elsewhere",
            split="calibration" if i % 5 == 0 else "discovery",
        )
        for i in range(1400)
    ]
    label, own = np.arange(1400) % 2, np.arange(1400) >= 1000
    values = generator.random((1400, 40)).astype(np.float32)
    values[:, 0] = np.where(own, 0.5, label * 0.8 + 0.2 * values[:, 0])
    values[own, 4:36] += 0.25 * label[own, None]
    matrix = {HOOK: values.astype(np.float16)}
    options: dict[str, Any] = {"candidates": 40, "max_features": 32, "report": lambda *_: None}
    large = fit_heads(matrix, documents, **options)["terror"]
    small = fit_small_heads(matrix, documents, tolerance=0.01, **options)["terror"]

    def on_pairs(head: FittedHead) -> float:
        rows, y = labels(documents, "terror", ("calibration",))
        part = own[rows]
        scores = values[np.ix_(rows, [i for _, i in head.features])] @ head.weights
        return float(auroc(scores[part], y[part])[0])

    assert held_out(large, matrix, documents) > 0.95
    assert on_pairs(small) >= on_pairs(large) - 0.02
    assert len(small.features) > 8

"""Which concepts a feature tells apart: planted ones are found, chance ones are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from training.concepts import SIGNIFICANCE, concept_scores
from training.contrast import PairRows
from training.discovery import adjusted

PAIRS = 16


def pairs(concepts: int, split: str = "train") -> list[PairRows]:
    return [
        PairRows(domain="politics", concept=f"c{c}", lang="en", split=split, positive=2 * n, negative=2 * n + 1)  # type: ignore[arg-type]
        for c in range(concepts)
        for n in range(c * PAIRS, (c + 1) * PAIRS)
    ]


def test_a_feature_that_fires_on_one_concepts_positives_alone_is_tagged_with_it_alone() -> None:
    fired = np.zeros((2 * 3 * PAIRS, 4), dtype=bool)
    fired[2 * PAIRS : 4 * PAIRS : 2, 1] = True
    found = concept_scores(fired, pairs(3))
    assert [len(scores) for scores in found] == [0, 1, 0, 0]
    score = found[1][0]
    assert (score.concept, score.pairs, score.frequency, score.reverse) == ("c1", PAIRS, 1.0, 0.0)
    assert score.q <= SIGNIFICANCE


def test_firing_on_both_sides_or_on_the_twin_alone_is_no_concept() -> None:
    fired = np.zeros((2 * PAIRS, 2), dtype=bool)
    fired[:, 0] = True
    fired[1::2, 1] = True
    assert concept_scores(fired, pairs(1)) == [[], []]


def test_features_that_fire_at_random_are_tagged_no_more_often_than_the_rate_allows() -> None:
    fired = np.random.default_rng(0).random((2 * 20 * PAIRS, 400)) < 0.3
    assert sum(map(bool, concept_scores(fired, pairs(20)))) <= 400 * SIGNIFICANCE


def test_neither_the_order_of_the_pairs_nor_those_of_the_test_split_matter() -> None:
    fired = np.random.default_rng(1).random((2 * 2 * PAIRS, 30)) < np.tile([0.9, 0.1], 2 * PAIRS)[:, None]
    expected = concept_scores(fired, pairs(2))
    assert any(expected)
    shuffled = concept_scores(fired, [*reversed(pairs(2)), *pairs(1, "test")])
    for before, after in zip(expected, shuffled, strict=True):
        assert sorted(before, key=lambda c: c.concept) == sorted(after, key=lambda c: c.concept)


@pytest.mark.parametrize("shape", [(50,), (7, 9)])
def test_adjusted_p_values_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    p = np.random.default_rng(2).random(shape) ** 3
    np.testing.assert_allclose(adjusted(p).ravel(), false_discovery_control(p.ravel()), rtol=1e-12)

"""Ranking figures against scikit-learn, and the screen for features that tell a domain."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.training.samples import document
from training.discovery import auroc, auroc_interval, labels, screen


@pytest.mark.parametrize("seed", range(4))
def test_auroc_equals_that_of_scikit_learn_with_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    y = generator.random(80) < 0.3
    scores = generator.integers(0, 6, (80, 5)).astype(np.float32) + y[:, None] * [0, 1, 2, -1, 0.5]
    np.testing.assert_allclose(auroc(scores, y), [roc_auc_score(y, column) for column in scores.T], rtol=1e-6)
    assert auroc(scores[:, 0], y)[0] == auroc(scores, y)[0]


def test_a_constant_is_worth_one_half() -> None:
    y = np.arange(10) < 4
    assert auroc(np.zeros((10, 3)), y).tolist() == [0.5] * 3
    found = auroc_interval(np.ones(10), y, seed=0)
    assert (found.value, found.null) == (0.5, 0.5)


@pytest.mark.parametrize("y", [np.zeros(5, dtype=bool), np.ones(5, dtype=bool)])
def test_one_class_alone_has_no_auroc(y: np.ndarray) -> None:
    assert np.isnan(auroc(np.arange(5.0), y)).all()


@pytest.mark.parametrize("shift", [-8.0, -1.0, 0.0, 0.5, 2.0, 8.0])
def test_the_interval_contains_its_value_and_narrows_with_data(shift: float) -> None:
    generator = np.random.default_rng(1)
    widths = []
    for n in (60, 600):
        y = np.arange(n) % 3 == 0
        found = auroc_interval(generator.normal(size=n) + shift * y, y, seed=0)
        assert 0 <= found.low <= found.value <= found.high <= 1
        widths.append(found.high - found.low)
    assert widths[1] <= widths[0]


def test_the_interval_is_that_of_hanley_and_mcneil() -> None:
    y = np.array([True] * 51 + [False] * 58)  # the sizes of their example
    scores = np.concatenate([np.linspace(0.4, 1.6, 51), np.linspace(0, 1, 58)])
    found = auroc_interval(scores, y, seed=0)
    a = found.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 50 * (q1 - a * a) + 57 * (q2 - a * a)) / (51 * 58))
    assert found.high - found.value == pytest.approx(1.96 * error)
    assert found.value - found.low == pytest.approx(1.96 * error)


def test_shuffled_labels_stay_below_a_real_signal_and_above_none() -> None:
    generator = np.random.default_rng(2)
    y = np.arange(200) % 2 == 0
    real = auroc_interval(generator.normal(size=200) + y, y, seed=3)
    assert 0.5 < real.null < 0.62 < real.low
    assert real == auroc_interval(np.random.default_rng(2).normal(size=200) + y, y, seed=3)


def test_labels_are_those_known_in_the_given_splits() -> None:
    documents = [
        document("a", split="discovery", domains=["terror"]),
        document("b", split="test", domains=["terror"]),
        document("c", split="discovery", known=["terror"]),
        document("d", split="discovery"),
        document("e", split="calibration", known=["terror"]),
    ]
    found = labels(documents, "terror", ("discovery",))
    assert (found.rows.tolist(), found.y.tolist()) == ([0, 2], [True, False])
    assert labels(documents, "politics", ("discovery",)).rows.shape == (0,)


def planted() -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(4)
    y = np.arange(200) % 2 == 0
    pooled = np.maximum(generator.normal(size=(200, 30)), 0).astype(np.float32)
    return pooled, y, ["a" if i < 150 else "b" for i in range(200)]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_screen_puts_a_planted_feature_first(sign: int) -> None:
    pooled, y, sources = planted()
    pooled[y == (sign > 0), 17] += 1.5
    assert screen(pooled, y, sources, limit=10)[0] == 17
    assert len(screen(pooled, y, sources, limit=10)) == 10


def test_the_screen_ignores_features_too_rare_to_be_judged() -> None:
    pooled, y, sources = planted()
    pooled[:, 3] = 0.0
    pooled[np.flatnonzero(y)[:4], 3] = 100.0
    pooled[:, 4] = 0.0
    chosen = screen(pooled, y, sources, limit=1000).tolist()
    assert sorted(chosen) == [i for i in range(30) if i not in (3, 4)]
    assert screen(np.zeros_like(pooled), y, sources, limit=5).tolist() == []


def test_a_large_sources_style_does_not_outrank_what_holds_in_every_source() -> None:
    generator = np.random.default_rng(5)
    sources = ["large"] * 400 + ["small"] * 40 + ["other"] * 440
    y = np.arange(880) < 440
    pooled = np.maximum(generator.normal(size=(880, 5)), 0).astype(np.float32)
    pooled[:400, 1] += 0.8  # the style of one source of positives
    pooled[:440, 2] += 0.7
    assert screen(pooled, y, sources, limit=1)[0] == 2

"""Thresholds keep the rate they are named after, whatever the sources weigh."""

from __future__ import annotations

import numpy as np
import pytest

from training.calibration import FPRS, balanced_weights, thresholds


@pytest.mark.parametrize("seed", range(4))
def test_at_most_the_named_share_of_negatives_reaches_a_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, y = rng.random(2000).astype(np.float32), rng.random(2000) < 0.3
    sources = [("large", "small")[int(i < 200)] for i in range(2000)]
    p[:200] = 0.7 + 0.3 * p[:200]  # the small source is the closer one
    for given in (None, sources):
        found = thresholds(p, y, given)
        weight = np.ones(len(y)) if given is None else balanced_weights(y, sources)
        for rate in FPRS:
            reached = p >= found[f"{rate:g}"]
            share = weight[~y & reached].sum() / weight[~y].sum()
            assert share <= rate + 1e-6
            assert share > rate - 0.02  # and no higher than needed
    assert thresholds(p, y, sources)["0.01"] >= thresholds(p, y)["0.01"]


def test_sources_of_one_size_change_nothing() -> None:
    p = np.random.default_rng(0).random(400).astype(np.float32)
    y = np.arange(400) % 4 == 0
    assert thresholds(p, y, ["a", "b"] * 200) == thresholds(p, y, ["a"] * 400)


def test_few_negatives_let_none_reach() -> None:
    p = np.array([0.2, 0.4, 0.9], dtype=np.float32)
    found = thresholds(p, np.array([False, False, True]))
    assert all(0.4 < value < 0.41 for value in found.values())

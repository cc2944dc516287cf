"""Spearman's rank correlation of a handful of points, with a permutation test and a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Values = Sequence[float] | npt.NDArray[np.float64]
PERMUTATIONS, RESAMPLES = 10_000, 2000


def rank_correlation(x: Values, y: Values, *, groups: Sequence[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """`rho`, `p` (two-sided, by permuting y, within its groups if given), and `interval` (95 %, points resampled).

    A side that does not vary has no rank correlation: rho is 0, p is 1.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or len(a) < 3:
        raise ValueError(f"{len(a)} and {len(b)} points; a correlation needs three pairs at least")
    observed = float(_spearman(a[None], b[None])[0])
    rng = np.random.default_rng(seed)
    labels = np.zeros(len(a), dtype=np.int64) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    # Random keys sorted within the groups: place i receives another point of its own group
    keys = rng.random((PERMUTATIONS, len(a))) + labels
    home = np.argsort(labels, kind="stable")
    order = np.empty_like(keys, dtype=np.int64)
    order[:, home] = np.argsort(keys, axis=1)
    shuffled = _spearman(np.broadcast_to(a, order.shape), b[order])
    drawn = rng.integers(0, len(a), (RESAMPLES, len(a)))
    samples = _spearman(a[drawn], b[drawn])
    low, high = np.quantile(samples, (0.025, 0.975))
    return {
        "rho": round(observed, 4),
        "p": round(float((1 + (np.abs(shuffled) >= abs(observed) - 1e-12).sum()) / (1 + PERMUTATIONS)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
    }


def within_groups(values: Values, groups: Sequence[str]) -> npt.NDArray[np.float64]:
    """The values less the mean of their group: what is left when the groups' own levels do not count."""
    found = np.asarray(values, dtype=np.float64).copy()
    names = np.array(groups)
    for name in set(groups):
        found[names == name] -= found[names == name].mean()
    return found


def _spearman(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Row by row; ties share their mean rank; 0 where a side does not vary."""
    a, b = rankdata(x, axis=1), rankdata(y, axis=1)
    a -= a.mean(1, keepdims=True)
    b -= b.mean(1, keepdims=True)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    found: npt.NDArray[np.float64] = (a * b).sum(1) / np.where(scale > 0, scale, 1.0)
    return found

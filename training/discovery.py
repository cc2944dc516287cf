"""Which features tell a domain from the rest, measured on labelled documents, against shuffled labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from training.corpus import Document

FloatArray = npt.NDArray[np.float32]


class Labels(NamedTuple):
    """Documents whose label for one domain is known."""

    rows: npt.NDArray[np.int64]
    y: npt.NDArray[np.bool_]


def labels(documents: Sequence[Document], domain: str, splits: Sequence[str]) -> Labels:
    """The labelled documents of the given splits."""
    known = [
        (row, bool(label))
        for row, d in enumerate(documents)
        if d.split in splits and (label := d.label(domain)) is not None
    ]
    return Labels(
        np.array([row for row, _ in known], dtype=np.int64),
        np.array([label for _, label in known], dtype=bool),
    )


def auroc(scores: npt.NDArray[np.floating], y: npt.NDArray[np.bool_]) -> FloatArray:
    """Area under the ROC curve of every column of `scores`, (n,) or (n, m), ties counted half; NaN for one class."""
    columns = scores.reshape(len(scores), -1)
    positives, negatives = int(y.sum()), int((~y).sum())
    if positives == 0 or negatives == 0:
        return np.full(columns.shape[1], np.nan, dtype=np.float32)
    ranks = rankdata(columns, axis=0)
    area = (ranks[y].sum(0) - positives * (positives + 1) / 2) / (positives * negatives)
    result: FloatArray = area.astype(np.float32)
    return result


class Interval(NamedTuple):
    """An AUROC with its 95 % interval and the value that shuffled labels reach at their 97.5th percentile."""

    value: float
    low: float
    high: float
    null: float


def spread(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil, 1982)."""
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = (value * (1 - value) + (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)) / (
        positives * negatives
    )
    return float(max(variance, 0.0) ** 0.5)


def auroc_intervals(
    scores: npt.NDArray[np.floating], y: npt.NDArray[np.bool_], *, seed: int, shuffles: int = 100
) -> list[Interval]:
    """One interval a column of `scores`, (n, m), by `spread`; nulls from 100 permutations of the labels."""
    positives, negatives = int(y.sum()), int((~y).sum())
    ranks = rankdata(scores, axis=0)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((shuffles, len(y)))
    for row in drawn:
        row[rng.permutation(len(y))[:positives]] = 1.0
    sums = np.concatenate([y[None].astype(np.float64), drawn]) @ ranks
    areas = (sums - positives * (positives + 1) / 2) / (positives * negatives)
    nulls = np.quantile(areas[1:], 0.975, axis=0)
    found = []
    for value, null in zip(areas[0].astype(np.float32).tolist(), nulls.tolist(), strict=True):
        margin = 1.96 * spread(value, positives, negatives)
        found.append(Interval(value, max(0.0, value - margin), min(1.0, value + margin), null))
    return found


def auroc_interval(scores: npt.NDArray[np.floating], y: npt.NDArray[np.bool_], *, seed: int) -> Interval:
    """The same of one column, (n,)."""
    return auroc_intervals(scores[:, None], y, seed=seed)[0]


def adjusted(p: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Benjamini and Hochberg's (1995) adjusted p-values over all entries of an array, in its shape."""
    flat = p.ravel()
    order = np.argsort(-flat, kind="stable")
    ranks = np.arange(flat.size, 0, -1)
    found = np.empty_like(flat)
    found[order] = np.minimum.accumulate(np.minimum(flat[order] * flat.size / ranks, 1.0))
    return found.reshape(p.shape)


def auroc_p(values: FloatArray, y: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """One-sided p-values of AUROCs above a half, by Mann and Whitney's normal approximation without ties."""
    from scipy.stats import norm

    positives, negatives = int(y.sum()), int((~y).sum())
    error = ((positives + negatives + 1) / (12 * positives * negatives)) ** 0.5
    p: npt.NDArray[np.float64] = norm.sf((values.astype(np.float64) - 0.5) / error)
    return p


def screen(
    pooled: FloatArray, y: npt.NDArray[np.bool_], sources: Sequence[str], *, limit: int
) -> npt.NDArray[np.int64]:
    """The columns, at most `limit`, that separate the classes best by Welch's t, each source weighing alike.

    Weighing sources alike keeps one large source's style from filling the list.
    """
    weight = np.zeros(len(y), dtype=np.float32)
    for side in (True, False):
        names = sorted({s for s, label in zip(sources, y, strict=True) if label == side})
        for name in names:
            member = np.array([s == name for s in sources]) & (y == side)
            weight[member] = 1 / (len(names) * np.sqrt(member.sum()))
        weight[y == side] /= weight[y == side].sum()
    mean_pos, mean_neg = weight[y] @ pooled[y], weight[~y] @ pooled[~y]
    var_pos = weight[y] @ (pooled[y] - mean_pos) ** 2
    var_neg = weight[~y] @ (pooled[~y] - mean_neg) ** 2
    t = (mean_pos - mean_neg) / np.sqrt(var_pos / max(y.sum(), 1) + var_neg / max((~y).sum(), 1) + 1e-12)
    judged = np.flatnonzero((pooled[y] > 0).sum(0) >= 5)  # others are too rare
    order: npt.NDArray[np.int64] = judged[np.argsort(-np.abs(t[judged]), kind="stable")[:limit]]
    return order

"""Sparse domain heads: which features, which weights, and what probability a score means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError
from feature_bank.heads import agreement, moving_average
from feature_bank.schema import Calibration, Pooling

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
FPRS = (0.001, 0.01, 0.05)


@dataclass(frozen=True, kw_only=True)
class SparseHead:
    """A linear head over pooled features: columns of the fitted matrix, their weights, and the bias."""

    columns: npt.NDArray[np.int64]
    weights: FloatArray
    bias: float


# Chosen by leaving one source of positives out at a time, on fitting rows alone: cross-validation within the sources
# asks for a penalty many times weaker, which then fails on a source that was never seen.
RIDGE_C = 0.001


def fit_sparse_head(
    pooled: FloatArray, y: BoolArray, weight: FloatArray, *, max_features: int, ridge: float = RIDGE_C
) -> SparseHead:
    """Ridge logistic regression on all columns, then again on the `max_features` with the largest coefficients.

    Columns are scaled to unit spread first. weight: per document. ridge: scikit-learn's C, the inverse of the penalty.

    Raises DataError if no column varies.
    """
    from sklearn.linear_model import LogisticRegression

    spread = pooled.std(0) + 0.003
    scaled = pooled / spread
    if not (pooled.std(0) > 0).any():
        raise DataError("no feature fires on the labelled text; give more, or more varied, labelled rows")
    columns = np.arange(pooled.shape[1])
    if len(columns) > max_features:
        first = LogisticRegression(C=ridge, max_iter=200).fit(scaled, y, sample_weight=weight)
        columns = np.sort(np.argsort(-np.abs(first.coef_[0]), kind="stable")[:max_features])
    final = LogisticRegression(C=ridge, max_iter=500).fit(scaled[:, columns], y, sample_weight=weight)
    return SparseHead(
        columns=columns.astype(np.int64),
        weights=(final.coef_[0] / spread[columns]).astype(np.float32),
        bias=float(final.intercept_[0]),
    )


def balanced_weights(y: BoolArray, sources: Sequence[str]) -> FloatArray:
    """Both classes weigh alike, and within a class every source by the square root of its size; the mean is 1."""
    weight = np.zeros(len(y), dtype=np.float64)
    for side in (True, False):
        for name in sorted({s for s, label in zip(sources, y, strict=True) if label == side}):
            member = np.array([s == name for s in sources]) & (y == side)
            weight[member] = 1 / np.sqrt(member.sum())
        weight[y == side] /= weight[y == side].sum()
    balanced: FloatArray = (weight * len(y) / weight.sum()).astype(np.float32)
    return balanced


def document_scores(
    acts: npt.NDArray[np.float16],
    documents: npt.NDArray[np.int64],
    weights: FloatArray,
    bias: float,
    pooling: Pooling,
    n_documents: int,
    *,
    streaming: bool = False,
) -> FloatArray:
    """(n_documents,) the uncalibrated logit of every document, as the guard computes it. -inf for those without rows.

    streaming: as of a response that is judged token by token, rather than of a text that lies there whole.

    acts: (tokens, F) normalised activations; documents: the document of every row, rows of one being consecutive.
    """
    used = np.flatnonzero(weights)
    clipped = np.minimum(acts[:, used].astype(np.float32), pooling.ceiling)
    evidence: FloatArray = (clipped @ weights[used])[:, None]
    average = moving_average(evidence, documents, pooling.streamed if streaming else pooling)
    logits: FloatArray = average + np.float32(bias)
    settled = pooling.settle_tokens if streaming else pooling.window
    agreed = agreement(logits, documents, pooling.evidence_tokens, settled=settled)[:, 0]
    result = np.full(n_documents, -np.inf, dtype=np.float32)
    np.maximum.at(result, documents, agreed)
    return result


def calibrate(scores: FloatArray, y: BoolArray) -> Calibration:
    """Platt scaling on held-out documents, both classes weighing alike: 0.5 is where they are equally likely.

    Raises DataError without documents of both classes, or if the score does not rise with the domain.
    """
    from sklearn.linear_model import LogisticRegression

    if y.all() or not y.any():
        raise DataError("the held-out labelled text has only one class; give more labelled rows of both")

    fitted = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], y)
    slope = float(fitted.coef_[0, 0])
    if slope <= 0:
        raise DataError("the head's score does not rise with the domain on held-out text; give more labelled rows")
    return Calibration(slope=slope, intercept=float(fitted.intercept_[0]))


def thresholds(probabilities: FloatArray, y: BoolArray, sources: Sequence[str] | None = None) -> dict[str, float]:
    """Per false-positive rate, the least probability that at most this share of the negatives reaches.

    sources: of every document; those of a class then weigh as in `balanced_weights`. Else a large source of text that
    nobody would mistake sets a threshold that much of a small, closer one passes.
    """
    negatives = probabilities[~y]
    weight = np.ones(len(y)) if sources is None else balanced_weights(y, sources).astype(np.float64)
    order = np.argsort(-negatives, kind="stable")
    share = np.cumsum(weight[~y][order]) / weight[~y].sum()
    found: dict[str, float] = {}
    for rate in FPRS:
        allowed = int(np.searchsorted(share, rate + 1e-9, side="right"))
        found[f"{rate:g}"] = float(np.nextafter(negatives[order[min(allowed, len(order) - 1)]], np.float32(1.0)))
    return found


def probability(scores: FloatArray, calibration: Calibration) -> FloatArray:
    """sigmoid(slope * score + intercept)."""
    logit: Any = calibration.slope * scores.astype(np.float64) + calibration.intercept
    result: FloatArray = (1 / (1 + np.exp(-np.clip(logit, -60, 60)))).astype(np.float32)
    return result

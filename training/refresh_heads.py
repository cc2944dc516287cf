"""A domain's head fitted again, held to what it was: marked texts pull at it, replayed texts and a ridge hold it.

For one form of a head (whole texts, or streaming windows) the weights are the minimum of a convex sum:

    sum over marked texts     a_i CE(y_i, u_i)              what people said of them
    sum over replayed texts   a_i CE(sigmoid(u0_i), u_i)    what the present head says of them
    ridge/2 |D (w - w0)|^2 + ridge/2 (b - b0)^2             D: every column's spread

with u = w . m + b over window averages m and u0 the same with the present weights. Without anything marked wrong, and
without a rejected feature, the present weights are the minimum exactly. Rejected features weigh 0, and what they did is
left to the others as far as replayed texts show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.heads import agreement, moving_average, segment_starts
from feature_bank.schema import Calibration, HeadRecord, Pooling
from training.calibration import BoolArray, FloatArray, probability
from training.refresh_texts import Ints, Texts
from training.streaming import WINDOWS

__all__ = ["Form", "Rows", "ends_of", "fit_held", "forms_of", "join_rows", "read_rows", "score"]

Doubles = npt.NDArray[np.float64]
STEPS = 50
SPREAD_FLOOR = 0.003  # as in `training.calibration.fit_sparse_head`


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of a domain's head."""

    streaming: bool
    pooling: Pooling
    """As this form pools: its window is the one that counts."""
    columns: Ints
    """Places of the head's features in the bank's order."""
    weights: Doubles
    bias: float
    calibration: Calibration
    thresholds: dict[str, float]

    def probabilities(self, scores: Doubles) -> FloatArray:
        """What scores of this form mean; 0 for a text without a token."""
        finite = np.where(np.isfinite(scores), scores, -1e9).astype(np.float32)
        return probability(finite, self.calibration)


def forms_of(head: HeadRecord, pooling: Pooling, position: dict[str, int]) -> tuple[Form, Form]:
    """The forms for whole texts and for responses that stream. position: the place of every feature of the bank."""
    columns = np.array([position[feature] for feature in head.features], dtype=np.int64)
    streamed = head.streaming or head
    return (
        Form(
            streaming=False,
            pooling=pooling,
            columns=columns,
            weights=np.array(head.weights),
            bias=head.bias,
            calibration=head.calibration,
            thresholds=dict(head.thresholds),
        ),
        Form(
            streaming=True,
            pooling=pooling.streamed,
            columns=columns,
            weights=np.array(streamed.weights),
            bias=streamed.bias,
            calibration=streamed.calibration,
            thresholds=dict(head.streaming_thresholds),
        ),
    )


def _agreed(form: Form, texts: Texts) -> tuple[Doubles, Doubles]:
    """(T,) the score after every token, and that on which enough tokens agree."""
    evidence = (_clipped(form, texts) @ form.weights)[:, None]
    logits = moving_average(evidence, texts.segment, form.pooling) + form.bias
    settled = form.pooling.settle_tokens if form.streaming else form.pooling.window
    return logits[:, 0], agreement(logits, texts.segment, form.pooling.evidence_tokens, settled=settled)[:, 0]


def score(form: Form, texts: Texts) -> Doubles:
    """(n,) the uncalibrated score of every text as the guard has it, over its segments; -inf for one without a row."""
    found = np.full(texts.n, -np.inf)
    if len(texts.text):
        np.maximum.at(found, texts.text, _agreed(form, texts)[1])
    return found


def ends_of(form: Form, texts: Texts, *, spread: bool) -> Ints:
    """Rows at which a window of every segment ends: where the form scores highest, and, with `spread`, evenly over the
    segment, as streaming heads are fitted on."""
    if not len(texts.text):
        return np.zeros(0, dtype=np.int64)
    logits, agreed = _agreed(form, texts)
    starts = np.flatnonzero(np.diff(texts.segment, prepend=-1))
    found = []
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(texts.segment)], strict=True):
        best = start + int(agreed[start:stop].argmax())
        first = max(start, best - form.pooling.evidence_tokens + 1)
        peak = first + int(logits[first : best + 1].argmin())  # of those that agree, the one that decides
        found.append(peak if np.isfinite(agreed[best]) else stop - 1)
        if spread:
            n, window = stop - start, form.pooling.window
            number = min(WINDOWS, 2 + 2 * (n - window) // window) if n > window else 1
            found += (start + np.linspace(min(window, n), n, number).astype(int) - 1).tolist()
    return np.unique(np.array(found, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a head is fitted on: window averages, what is said of each, and how much that counts."""

    x: Doubles
    """(n, k) over the head's columns."""
    target: Doubles
    """(n,) in 0..1."""
    weight: Doubles
    text: Ints
    """(n,) the text that the window is of."""


def read_rows(form: Form, texts: Texts, ends: Ints, target: Doubles | None, weight: Doubles) -> Rows:
    """The windows that end at `ends`; those of one text share its weight (n,). target: of every text, (n,); None: what
    the form itself says of the window."""
    start = segment_starts(texts.segment)[ends] if len(ends) else ends
    first = np.maximum(start, ends - form.pooling.window + 1)
    lengths = ends - first + 1
    rows = np.repeat(first - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
    part = np.repeat(1.0 / np.maximum(lengths, form.pooling.min_tokens), lengths)
    take = sparse.csr_matrix((part, (np.repeat(np.arange(len(ends)), lengths), rows)), (len(ends), len(texts.text)))
    x = (take @ _clipped(form, texts)).toarray().astype(np.float64)
    text = texts.text[ends]
    share = weight[text] / np.bincount(text, minlength=texts.n)[text]
    said = _sigmoid(x @ form.weights + form.bias) if target is None else target[text]
    return Rows(x=x, target=said, weight=share, text=text)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """All rows of the parts."""
    return Rows(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "target", "weight", "text")}
    )


def fit_held(form: Form, rows: Rows, *, ridge: float, rejected: BoolArray, tolerance: float = 1e-9) -> Form:
    """The form with weights and bias at the minimum of the sum above, by damped Newton steps from the present ones.

    rejected: (k,) columns that are to weigh 0. Calibration and thresholds stay: they are of the old scores.
    """
    free = np.flatnonzero(~rejected)
    spread = np.maximum(rows.x[:, free].std(0), 0.0) + SPREAD_FLOOR if len(rows.x) else np.ones(len(free))
    design = np.concatenate([rows.x[:, free] / spread, np.ones((len(rows.x), 1))], axis=1)
    held = np.append(form.weights[free] * spread, form.bias)
    now = held.copy()
    # The logits come from the weights themselves while these have not moved, so that a target made of them is met
    logits = rows.x @ np.where(rejected, 0.0, form.weights) + form.bias
    value = _loss(logits, rows, now - held, ridge)
    for _ in range(STEPS):
        p = _sigmoid(logits)
        gradient = design.T @ (rows.weight * (p - rows.target)) + ridge * (now - held)
        if np.abs(gradient).max(initial=0.0) <= tolerance * max(1.0, float(rows.weight.sum())):
            break
        curvature = rows.weight * np.maximum(p * (1 - p), 1e-12)
        step = np.linalg.solve((design * curvature[:, None]).T @ design + ridge * np.eye(len(now)), gradient)
        size = 1.0
        while size > 1e-6:
            tried = now - size * step
            tried_logits = design @ tried
            tried_value = _loss(tried_logits, rows, tried - held, ridge)
            if tried_value <= value:
                break
            size /= 2
        else:
            break
        now, logits, value = tried, tried_logits, tried_value
    if np.array_equal(now, held):
        return form if not rejected.any() else replace(form, weights=np.where(rejected, 0.0, form.weights))
    weights = np.zeros(len(form.weights))
    weights[free] = now[:-1] / spread
    return replace(form, weights=weights, bias=float(now[-1]))


def _loss(logits: Doubles, rows: Rows, moved: Doubles, ridge: float) -> float:
    entropy = np.logaddexp(0.0, logits) - rows.target * logits
    return float(rows.weight @ entropy + 0.5 * ridge * (moved @ moved))


def _sigmoid(logits: Doubles) -> Doubles:
    result: Doubles = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
    return result


def _clipped(form: Form, texts: Texts) -> sparse.csr_matrix:
    """(T, k) the clipped activations of the head's features; texts that were narrowed hold these alone."""
    if texts.ceiling is not None:
        return texts.acts
    return texts.narrow(form.columns, form.pooling.ceiling).acts

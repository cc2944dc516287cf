"""Small logistic regressions on a sample of cases and controls, and the choice of a few columns for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
RIDGE = 0.3  # holds the weights of terms that separate perfectly; in cases
_STEPS, _TOLERANCE = 25, 1e-5


@dataclass(frozen=True, kw_only=True)
class Fit:
    """p = sigmoid(bias + X[:, columns] @ weights)."""

    columns: tuple[int, ...]
    weights: FloatArray
    bias: float


def sigmoid(z: npt.NDArray[np.floating]) -> FloatArray:
    """The logistic function."""
    found: FloatArray = 0.5 * (1.0 + np.tanh(0.5 * z.astype(np.float64)))
    return found


def fit_logistic(X: FloatArray, y: BoolArray, start: FloatArray | None = None) -> FloatArray:
    """(1 + m,) bias and weights that maximise the likelihood less a small ridge on the weights, by Newton's method.

    X: (n, m).
    """
    design = np.concatenate([np.ones((len(X), 1)), X], axis=1)
    penalty = np.full(design.shape[1], RIDGE)
    penalty[0] = 1e-6
    beta = np.zeros(design.shape[1]) if start is None else start.astype(np.float64)
    for _ in range(_STEPS):
        p = sigmoid(design @ beta)
        gradient = design.T @ (y - p) - penalty * beta
        curvature = (design * (p * (1 - p))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        largest = np.abs(step).max()
        beta = beta + step * min(1.0, 4.0 / max(largest, 1e-12))  # far from the optimum a full step overshoots
        if largest < _TOLERANCE:
            break
    return beta


def select_forward(
    X: FloatArray, y: BoolArray, X_held: FloatArray, y_held: BoolArray, *, rate: float, largest: int, least_gain: float
) -> Fit:
    """Columns taken one by one, each the one with the largest score statistic given those before it.

    As many are kept as lower the log-loss on held-out cases, `least_gain` of the loss of no column each at the least.

    X, X_held: (n, m) zeros and ones, cases and controls sampled apart; `rate`: the share of cases in the whole, to
    which the bias is corrected (King and Zeng 2001: less the log-odds of the sample, plus those of the whole) and the
    held-out loss is weighted.
    """
    shift = _log_odds(rate) - _log_odds(float(y.mean()))
    weight = np.where(y_held, rate / max(y_held.mean(), 1e-9), (1 - rate) / max((~y_held).mean(), 1e-9))
    beta = np.array([_log_odds(float(y.mean()))])
    chosen: list[int] = []
    path = [Fit(columns=(), weights=np.zeros(0), bias=float(beta[0]) + shift)]
    losses = [_loss(path[0], X_held, y_held, weight)]
    squares = X.sum(0)
    free = (squares >= 2) & (squares <= len(X) - 2)
    while len(chosen) < largest and free.any():
        p = sigmoid(beta[0] + X[:, chosen] @ beta[1:])
        gradient = X.T @ (y - p)
        statistic = np.where(free, gradient**2 / (X.T @ (p * (1 - p)) + RIDGE), -1.0)  # X is 0 or 1: its own square
        best = int(statistic.argmax())
        if statistic[best] < _LEAST_STATISTIC:
            break
        chosen.append(best)
        free[best] = False
        beta = fit_logistic(X[:, chosen], y, np.append(beta, 0.0))
        path.append(Fit(columns=tuple(chosen), weights=beta[1:], bias=float(beta[0]) + shift))
        losses.append(_loss(path[-1], X_held, y_held, weight))
    best = 0
    for size in range(1, len(path)):
        if losses[size] < losses[best] - least_gain * losses[0] * (size - best):
            best = size
    return path[best]


_LEAST_STATISTIC = 6.6  # chi-squared with one degree of freedom at p = 0.01


def _loss(fit: Fit, X: FloatArray, y: BoolArray, weight: FloatArray) -> float:
    z = fit.bias + X[:, fit.columns] @ fit.weights
    return float((weight * np.logaddexp(0.0, np.where(y, -z, z))).mean())


def _log_odds(p: float) -> float:
    clipped = min(max(p, 1e-6), 1 - 1e-6)
    return float(np.log(clipped / (1 - clipped)))

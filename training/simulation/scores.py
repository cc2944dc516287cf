"""How well a prediction agrees with what a feature does, with an interval, and against other explanations."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from feature_bank.schema import SimulationScore
from training.simulation.samples import Truth

RESAMPLES = 200
_SHUFFLES = 100
FloatArray = npt.NDArray[np.float64]


def score(
    prediction: npt.NDArray[Any],
    truth: Truth,
    null: npt.NDArray[Any] | None,
    *,
    level: Literal["token", "segment"],
    simulator: str,
    seed: int,
) -> SimulationScore | None:
    """The scores of one prediction; None if there is nothing to measure: no answer, or a truth that never varies.

    prediction: (n,) in any unit that rises with the activation, NaN where there is no usable answer. null: (n, k) what
    the explanations of k other features predict here, NaN alike; without any, the prediction is shuffled instead.

    corr is Pearson's correlation with the grades 0 to 10 over the sample as it was drawn; a constant prediction has 0.
    Its interval comes from resampled documents. The other measures are weighted to the base rates of the test split,
    and a unit is called firing where the prediction exceeds its own mean there.
    """
    answered = np.isfinite(prediction)
    predicted = prediction[answered].astype(np.float64)
    grades = truth.grades[answered].astype(np.float64)
    if len(predicted) < 2 or grades.min() == grades.max():
        return None
    generator = np.random.default_rng(seed)
    corr = float(correlations(predicted[:, None], grades)[0])
    low, high = _interval(predicted, grades, truth.documents[answered], generator)
    if null is None or null.shape[1] == 0:
        others = np.stack([generator.permutation(predicted) for _ in range(_SHUFFLES)], axis=1)
        nulls = correlations(others, grades)
    else:
        nulls = _null_correlations(null[answered], grades)
    return SimulationScore(
        level=level,
        simulator=simulator,
        n=len(predicted),
        missing=int((~answered).sum()),
        corr=round(corr, 4),
        corr_low=round(low, 4),
        corr_high=round(high, 4),
        corr_null=round(float(np.quantile(nulls, 0.975)), 4) if len(nulls) else 0.0,
        corr_null_mean=round(float(nulls.mean()), 4) if len(nulls) else 0.0,
        **_classification(predicted, truth.fires[answered], truth.weights[answered]),
    )


def correlations(predictions: npt.NDArray[Any], truth: npt.NDArray[Any]) -> FloatArray:
    """(k,) Pearson's correlation of every column of predictions, (n, k), with truth, (n,); 0 where one is constant."""
    x = predictions.astype(np.float64)
    x -= x.mean(0)
    y = truth - truth.mean()
    norms = np.sqrt((x**2).sum(0) * (y**2).sum())
    found: FloatArray = np.divide(y @ x, norms, out=np.zeros(x.shape[1]), where=norms > 1e-9)
    return found


def _null_correlations(null: npt.NDArray[Any], grades: FloatArray) -> FloatArray:
    """Of each other explanation, over what it answered; one that says the same of everything is no comparison."""
    complete = np.isfinite(null).all(0)
    varied = null[:, complete]
    found = [correlations(varied[:, np.ptp(varied, axis=0) > 1e-9], grades)]
    for column in null[:, ~complete].T:
        known = np.isfinite(column)
        if known.sum() > 1 and np.ptp(column[known]) > 1e-9:
            found.append(correlations(column[known, None], grades[known]))
    return np.concatenate(found)


def _interval(
    predicted: FloatArray, grades: FloatArray, documents: npt.NDArray[np.int64], generator: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of the correlation, from documents drawn again with replacement."""
    x, y = predicted - predicted.mean(), grades - grades.mean()  # centred, so that the sums below lose no digits
    owner = np.unique(documents, return_inverse=True)[1]
    size = int(owner.max()) + 1
    sums = np.stack([np.bincount(owner, v, minlength=size) for v in (np.ones_like(x), x, y, x * x, y * y, x * y)])
    times = generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    n, sx, sy, sxx, syy, sxy = sums @ times.T
    spread = np.sqrt(np.maximum(sxx - sx**2 / n, 0) * np.maximum(syy - sy**2 / n, 0))
    drawn = np.divide(sxy - sx * sy / n, spread, out=np.zeros(RESAMPLES), where=spread > 1e-9)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _classification(predicted: FloatArray, fires: npt.NDArray[np.bool_], weights: FloatArray) -> dict[str, float]:
    if fires.all() or not fires.any():
        return {}
    from sklearn.metrics import average_precision_score, roc_auc_score

    called = predicted > np.average(predicted, weights=weights) + 1e-9
    sensitivity = np.average(called[fires], weights=weights[fires])
    specificity = np.average(~called[~fires], weights=weights[~fires])
    return {
        "auroc": round(float(roc_auc_score(fires, predicted, sample_weight=weights)), 4),
        "balanced_accuracy": round(float((sensitivity + specificity) / 2), 4),
        "pr_auc": round(float(average_precision_score(fires, predicted, sample_weight=weights)), 4),
    }

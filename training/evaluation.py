"""How well a bank's scores separate texts of known labels: ranking quality, and the operating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from feature_bank.errors import MissingExtraError
from feature_bank.schema import HeadRecord

__all__ = ["DomainQuality", "Labelled", "OperatingPoint", "measure", "measure_domains"]

FPRS = (0.01, 0.05)
OPERATING_FPR = "0.01"


class Labelled(Protocol):
    """A text whose labels are known in part."""

    def label(self, domain: str) -> bool | None:
        """Whether the domain is present; None if that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """What the bank's own threshold does to these texts."""

    target_fpr: float
    """The false-positive rate that the bank gives the threshold for, measured when it was calibrated."""
    threshold: float
    tpr: float | None
    """Share of the positives at or above the threshold; None if there are none."""
    fpr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainQuality:
    """One domain over the texts for which its label is known. What these texts cannot show is None."""

    n: int
    positives: int
    auroc: float | None
    auprc: float | None
    """Average precision; its chance level is positives / n."""
    tpr_at_fpr: Mapping[str, float | None]
    """Largest true-positive rate among thresholds with at most the key as false-positive rate here."""
    operating_point: OperatingPoint | None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON-ready values."""
        return asdict(self)


def measure(labels: Sequence[bool], scores: Sequence[float], threshold: float | None = None) -> DomainQuality:
    """Quality of `scores` (larger means present) against `labels`, and of the score `threshold`, if given.

    Ranking figures need at least one positive and one negative. Raises MissingExtraError without
    scikit-learn.
    """
    truth = np.asarray(labels, dtype=bool)
    values = np.asarray(scores, dtype=np.float64)
    if truth.shape != values.shape:
        raise ValueError(f"{len(labels)} labels for {len(scores)} scores")
    auroc = auprc = None
    tpr_at_fpr: dict[str, float | None] = {f"{fpr:g}": None for fpr in FPRS}
    if truth.any() and not truth.all():
        metrics = _metrics()
        auroc = float(metrics.roc_auc_score(truth, values))
        auprc = float(metrics.average_precision_score(truth, values))
        fpr, tpr, _ = metrics.roc_curve(truth, values, drop_intermediate=False)
        tpr_at_fpr = {f"{limit:g}": float(tpr[fpr <= limit].max()) for limit in FPRS}
    point = None
    if threshold is not None:
        point = OperatingPoint(
            target_fpr=float(OPERATING_FPR),
            threshold=threshold,
            tpr=_share(values[truth] >= threshold),
            fpr=_share(values[~truth] >= threshold),
        )
    return DomainQuality(
        n=len(truth),
        positives=int(truth.sum()),
        auroc=auroc,
        auprc=auprc,
        tpr_at_fpr=tpr_at_fpr,
        operating_point=point,
    )


def measure_domains(
    documents: Sequence[Labelled], scores: Sequence[Mapping[str, float]], heads: Mapping[str, HeadRecord]
) -> dict[str, DomainQuality]:
    """Every domain of a bank, each over the documents for which its label is known.

    scores: per document, the probability of each domain.
    """
    result = {}
    for domain, head in heads.items():
        known = [
            (label, float(by_domain[domain]))
            for document, by_domain in zip(documents, scores, strict=True)
            if (label := document.label(domain)) is not None
        ]
        labels, values = [label for label, _ in known], [value for _, value in known]
        result[domain] = measure(labels, values, head.thresholds.get(OPERATING_FPR))
    return result


def _share(reached: npt.NDArray[np.bool_]) -> float | None:
    return float(reached.mean()) if reached.size else None


def _metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError(
            "evaluation needs scikit-learn; install it with: pip install 'sailguard[train]'"
        ) from error
    return metrics

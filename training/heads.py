"""From pooled features of labelled documents to calibrated sparse heads, and the features that steering needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError
from feature_bank.taxonomy import DOMAINS
from training.calibration import SparseHead, balanced_weights, fit_sparse_head
from training.corpus import OWN_SOURCE, Document
from training.discovery import auroc, labels, screen
from training.selected import FeatureKey

FloatArray = npt.NDArray[np.float32]
SHARES = (0.25, 0.375, 0.5, 0.75)  # of a head's features that are tried, fewest first


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A domain's head over named features, before calibration."""

    features: tuple[FeatureKey, ...]
    weights: FloatArray
    bias: float


def fit_heads(
    pooled: Mapping[str, npt.NDArray[np.float16]],
    documents: Sequence[Document],
    *,
    candidates: int,
    max_features: int,
    report: Callable[[str, int], None],
    domains: Sequence[str] = DOMAINS,
    allowed: Collection[FeatureKey] | None = None,
) -> dict[str, FittedHead]:
    """One sparse head a domain on the discovery split; domains without labels of both kinds are left out.

    pooled: hook_name -> (n_documents, d_sae). allowed: the only features that may be used; all if left out.

    Raises DataError if no domain can be fitted.
    """
    heads: dict[str, FittedHead] = {}
    for done, domain in enumerate(domains, 1):
        rows, y = labels(documents, domain, ("discovery",))
        if y.sum() < 20 or (~y).sum() < 20:
            continue
        sources = [documents[row].source for row in rows]
        keys: list[FeatureKey] = []
        columns: list[FloatArray] = []
        for hook_name, matrix in pooled.items():
            among = np.arange(matrix.shape[1])
            if allowed is not None:
                among = np.array(sorted(i for name, i in allowed if name == hook_name), dtype=np.int64)
            part = matrix[np.ix_(rows, among)].astype(np.float32)
            chosen = screen(part, y, sources, limit=candidates)
            keys += [(hook_name, int(i)) for i in among[chosen]]
            columns.append(part[:, chosen])
        if not keys:
            continue
        head: SparseHead = fit_sparse_head(
            np.concatenate(columns, axis=1),
            y,
            balanced_weights(y, sources),
            max_features=max_features,
        )
        heads[domain] = FittedHead(features=tuple(keys[i] for i in head.columns), weights=head.weights, bias=head.bias)
        report(f"{domain}: {len(head.columns)} features", done)
    if not heads:
        raise DataError(
            "no domain has at least 20 positive and 20 negative labelled rows and a feature that may be used"
        )
    return heads


def fit_small_heads(
    pooled: Mapping[str, npt.NDArray[np.float16]],
    documents: Sequence[Document],
    *,
    candidates: int,
    max_features: int,
    tolerance: float,
    report: Callable[[str, int], None],
    allowed: Collection[FeatureKey] | None = None,
) -> dict[str, FittedHead]:
    """`fit_heads`, and then as few features a domain as cost at most `tolerance` of AUROC on the calibration split.

    Every feature that is left out saves its share of the guard's time at every token. A quarter, three eighths,
    a half and three quarters of `max_features` are tried.
    """
    options: dict[str, Any] = {"candidates": candidates, "allowed": allowed}
    heads = fit_heads(pooled, documents, max_features=max_features, report=report, **options)
    enough = {domain: _held_out_auroc(head, pooled, documents, domain) - tolerance for domain, head in heads.items()}
    for share in SHARES:
        size = int(max_features * share)
        left = [domain for domain in enough if len(heads[domain].features) > size]
        if tolerance <= 0 or size < 1 or not left:
            continue
        smaller = fit_heads(pooled, documents, max_features=size, report=lambda *_: None, domains=left, **options)
        for domain, head in smaller.items():
            if _held_out_auroc(head, pooled, documents, domain) >= enough[domain]:
                heads[domain] = head
                del enough[domain]
                report(f"{domain}: {len(head.features)} features are enough", len(heads))
    return heads


def _held_out_auroc(
    head: FittedHead, pooled: Mapping[str, npt.NDArray[np.float16]], documents: Sequence[Document], domain: str
) -> float:
    """The mean of two: over the project's own pairs, and over all other text, where a source may give a label away.

    Over one of them if the other lacks a class; NaN, which nothing reaches, if both do.
    """
    rows, y = labels(documents, domain, ("calibration",))
    columns = np.stack([pooled[name][rows, i] for name, i in head.features], axis=1).astype(np.float32)
    scores = columns @ head.weights
    own = np.array([documents[row].source == OWN_SOURCE for row in rows], dtype=bool)
    found = [auroc(scores[part], y[part])[0] for part in (own, ~own) if y[part].any() and not y[part].all()]
    return float(np.mean(found)) if found else float("nan")


def contrast_rows(documents: Sequence[Document], domain: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows with and without the domain between which only the concept differs.

    The project's own pairs where there are any (same genre, same length); else all labelled discovery documents.
    """
    own = [
        (row, domain in d.domains)
        for row, d in enumerate(documents)
        if d.source == OWN_SOURCE and d.split == "discovery" and domain in d.known and _of_domain(d, domain)
    ]
    positive = np.array([row for row, label in own if label], dtype=np.int64)
    negative = np.array([row for row, label in own if not label], dtype=np.int64)
    if len(positive) >= 20 and len(negative) >= 20:
        return positive, negative
    rows, y = labels(documents, domain, ("discovery",))
    return rows[y], rows[~y]


def _of_domain(document: Document, domain: str) -> bool:
    """Whether one of the project's documents was written for this domain's pairs: their ids say so."""
    return domain[:4] in document.id


def mean_difference(
    pooled: npt.NDArray[np.float16], positive: npt.NDArray[np.int64], negative: npt.NDArray[np.int64]
) -> FloatArray:
    """(d_sae,) mean pooled activation with the domain minus without."""
    difference: FloatArray = pooled[positive].astype(np.float32).mean(0) - pooled[negative].astype(np.float32).mean(0)
    return difference

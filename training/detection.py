"""What one feature detects by itself: per domain an AUROC against its null, and the cost on texts that look alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.taxonomy import DOMAINS
from training.contrast import ContrastTexts
from training.corpus import OWN_SOURCE, Document
from training.discovery import adjusted, auroc, auroc_intervals, auroc_p, labels, spread

FloatArray = npt.NDArray[np.float32]
SPLITS = ("discovery", "calibration")
FALSE_DISCOVERY_RATE = 0.01
OTHERS_ABOVE = 0.05  # the share of other texts that lies above the value at which look-alikes are counted


def detection_scores(
    pooled: FloatArray,
    documents: Sequence[Document],
    contrast_pooled: FloatArray,
    texts: ContrastTexts,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Per feature, the keys of `FeatureRecord.scores`.

    pooled, contrast_pooled: (documents, F) and (texts, F), the mean clipped activation of each. Look-alikes of a domain
    are the taxonomy's hard negatives and the texts written for the project that are known not to belong to it.
    """
    found: list[dict[str, float]] = [{} for _ in range(pooled.shape[1])]
    for domain in DOMAINS:
        rows, y = labels(documents, domain, SPLITS)
        if not 0 < y.sum() < len(y):
            continue
        values = pooled[rows]
        own = [
            row
            for row, d in enumerate(documents)
            if d.source == OWN_SOURCE and d.split in SPLITS and d.label(domain) is False
        ]
        hard = [hard.row for hard in texts.hard if hard.domain == domain]
        lookalikes = np.concatenate([pooled[own], contrast_pooled[hard]])
        cut = np.quantile(values[~y], 1 - OTHERS_ABOVE, axis=0)
        tpr, fpr = (values[y] > cut).mean(0), (lookalikes > cut).mean(0)
        elsewhere = np.array([bool(documents[row].domains - {domain}) for row in rows])
        rivals = y | elsewhere
        only = y[rivals]
        selectivity = auroc(values[rivals], only)
        intervals = auroc_intervals(values, y, seed=seed)
        for feature, scores in enumerate(found):
            for suffix, value in zip(("", "_low", "_high", "_null"), intervals[feature], strict=True):
                scores[f"auroc_{domain}{suffix}"] = round(float(value), 4)
            scores[f"tpr_{domain}"] = round(float(tpr[feature]), 4)
            if len(lookalikes):
                scores[f"lookalike_fpr_{domain}"] = round(float(fpr[feature]), 4)
            if np.isfinite(selectivity[feature]):
                margin = 1.96 * spread(float(selectivity[feature]), int(only.sum()), int((~only).sum()))
                scores[f"selectivity_{domain}"] = round(float(selectivity[feature]), 4)
                scores[f"selectivity_{domain}_low"] = round(float(selectivity[feature]) - margin, 4)
    return found


def detected(scores: Sequence[Mapping[str, float]], documents: Sequence[Document]) -> list[list[str]]:
    """Per feature, the domains that it detects: AUROC significant at a false discovery rate of 1 % over all features
    and domains, its interval above the null's, and the interval of its AUROC against other domains above a half."""
    names = [domain for domain in DOMAINS if scores and f"auroc_{domain}" in scores[0]]
    if not names:
        return [[] for _ in scores]
    p = np.stack(
        [
            auroc_p(np.array([s[f"auroc_{name}"] for s in scores], dtype=np.float32), labels(documents, name, SPLITS).y)
            for name in names
        ],
        axis=1,
    )
    keep = adjusted(p) <= FALSE_DISCOVERY_RATE
    return [
        [
            domain
            for column, domain in enumerate(names)
            if keep[row, column]
            and s[f"auroc_{domain}_low"] > max(0.5, s[f"auroc_{domain}_null"])
            and s.get(f"selectivity_{domain}_low", 1.0) > 0.5
        ]
        for row, s in enumerate(scores)
    ]

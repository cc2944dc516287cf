"""Heads over features that carry a domain's tag, each weighing the same; and the canary of a bank's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Rows
from feature_bank.errors import DataError
from feature_bank.layout import render, scored_positions
from feature_bank.schema import Calibration, Canary, FeatureRecord, Pooling
from guard.capture import pad_batch, truncated_forward
from training.calibration import calibrate, document_scores, probability, thresholds
from training.corpus import Document
from training.discovery import auroc_interval, labels

__all__ = ["ImportedHead", "record_canary", "tagged_head"]

FloatArray = npt.NDArray[np.float32]
LEAST_LABELS = 20
CANARY_FEATURES = 32
CANARY_TOLERANCE = 0.2  # as of banks that are trained here


@dataclass(frozen=True, kw_only=True)
class ImportedHead:
    """A domain's head: which features, and what a score means. Without columns there is none; the notes say why."""

    columns: tuple[int, ...] = ()
    calibration: Calibration = field(default_factory=lambda: Calibration(slope=1.0, intercept=0.0))
    thresholds: dict[str, float] = field(default_factory=dict)
    streaming_thresholds: dict[str, float] = field(default_factory=dict)
    difference: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """Per column, the mean pooled activation with the domain minus without; zero where labels are missing."""
    scores: Mapping[int, dict[str, float]] = field(default_factory=dict)
    """Of every tagged feature that was measured, also of those that did not pass."""
    quality: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tagged_head(
    domain: str,
    tagged: Sequence[int],
    pooled: FloatArray,
    acts: npt.NDArray[np.float16],
    token_documents: npt.NDArray[np.int64],
    documents: Sequence[Document],
    pooling: Pooling,
    *,
    seed: int,
) -> ImportedHead:
    """Weight 1 for each of the `tagged` columns that tells the domain apart on labelled text of the discovery split.

    pooled: (documents, F); acts: (tokens, F); token_documents: (tokens,). Calibrated on the calibration split; its
    AUROC on the test split is in `quality`. With fewer than 20 labels of a side every tagged feature counts,
    probability 0.5 is the score that one text in a hundred reaches, and the thresholds are for shares of all text
    rather than of negatives: `calibrated_<domain>` in `quality` is 0.
    """
    if not tagged:
        return ImportedHead(notes=(f"{domain}: no feature that carries its tag is there, so it has no head.",))
    rows, y = labels(documents, domain, ("discovery",))
    labelled = min(int(y.sum()), int((~y).sum())) >= LEAST_LABELS
    columns, scores = list(tagged), dict[int, dict[str, float]]()
    if labelled:
        columns = []
        for column in tagged:
            interval = auroc_interval(pooled[rows, column], y, seed=seed)
            scores[column] = {
                f"auroc_{domain}{suffix}": round(value, 4)
                for suffix, value in (
                    ("", interval.value),
                    ("_low", interval.low),
                    ("_high", interval.high),
                    ("_null", interval.null),
                )
            }
            if interval.low > max(0.5, interval.null):
                columns.append(column)
        if not columns:
            return ImportedHead(
                scores=scores,
                notes=(f"{domain}: none of {len(tagged)} tagged features tells it apart, so it has no head.",),
            )
    weights = np.zeros(acts.shape[1], dtype=np.float32)
    weights[columns] = 1.0
    whole, streamed = (
        document_scores(acts, token_documents, weights, 0.0, pooling, len(documents), streaming=streaming)
        for streaming in (False, True)
    )
    head: dict[str, Any] = {"columns": tuple(columns), "scores": scores}
    if not labelled:
        known = whole[np.isfinite(whole)]
        slope = 1.0 / max(float(known.std()), 1e-6)
        calibration = Calibration(slope=slope, intercept=-slope * float(np.quantile(known, 0.99)))
        nobody = np.zeros(len(known), dtype=bool)
        return ImportedHead(
            **head,
            calibration=calibration,
            thresholds=thresholds(probability(known, calibration), nobody),
            streaming_thresholds=thresholds(probability(streamed[np.isfinite(streamed)], calibration), nobody),
            difference=np.zeros(len(columns), dtype=np.float32),
            quality={f"calibrated_{domain}": 0.0},
            notes=(f"{domain}: too few labels, so its head is not calibrated, and no feature was measured.",),
        )
    held = labels(documents, domain, ("calibration",))
    kept = np.isfinite(whole[held.rows])
    chosen, truth = held.rows[kept], held.y[kept]
    try:
        calibration = calibrate(whole[chosen], truth)
    except DataError as e:
        return ImportedHead(scores=scores, notes=(f"{domain}: {e}; it has no head.",))
    quality = {f"calibrated_{domain}": 1.0}
    test = labels(documents, domain, ("test",))
    seen = np.isfinite(whole[test.rows])
    if 0 < test.y[seen].sum() < seen.sum():
        quality[f"test_auroc_{domain}"] = round(
            auroc_interval(whole[test.rows[seen]], test.y[seen], seed=seed).value, 4
        )
    return ImportedHead(
        **head,
        calibration=calibration,
        thresholds=thresholds(probability(whole[chosen], calibration), truth),
        streaming_thresholds=thresholds(probability(streamed[chosen], calibration), truth),
        difference=pooled[rows[y]][:, columns].mean(0) - pooled[rows[~y]][:, columns].mean(0),
        quality=quality,
    )


def record_canary(
    model: Any, tokenizer: Any, text: str, rows: Mapping[str, Rows], records: Sequence[FeatureRecord]
) -> Canary:
    """What the rows, as a bank stores them, give on a passage. Raises DataError if no feature fires on it."""
    rendered = render(tokenizer, text, "passage", max_tokens=256)
    ids, mask = pad_batch([rendered.ids], 0, next(model.parameters()).device)
    hidden = truncated_forward(model, list(rows), ids, mask)
    positions = scored_positions(rendered, tokenizer.all_special_ids)
    means = []
    for name, part in rows.items():
        x = hidden[name][0, positions].float().cpu().numpy()
        pre = x @ part.W_enc.astype(np.float16).astype(np.float32) + part.b_enc
        means.append(np.where(pre > part.threshold, pre, 0).mean(0))
    found = np.concatenate(means) / np.array([record.scale for record in records])
    if not found.any():
        raise DataError("no feature fires on the canary text, so it would prove nothing; give a preset with another")
    strongest = np.argsort(-found, kind="stable")[:CANARY_FEATURES]
    return Canary(
        text=text,
        activations={records[i].id: round(float(found[i]), 6) for i in strongest},
        tolerance=CANARY_TOLERANCE,
    )

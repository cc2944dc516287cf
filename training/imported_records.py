"""The parts of a bank made from a collection: features measured at a hook point, their rows, records and heads."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Rows
from feature_bank.formats import LoadedSAE
from feature_bank.interop.records import ImportedFeature
from feature_bank.sae import SAE
from feature_bank.schema import FeatureRecord, HeadRecord, HookRecord, Pooling
from training.activations import QUANTILES, FeatureStats, encode_tokens, feature_stats, pool_documents
from training.imported_heads import ImportedHead
from training.row_form import RowForm, row_form

__all__ = ["MeasuredHook", "bank_rows", "head_record", "hook_record", "imported_records", "measure_hook"]

FloatArray = npt.NDArray[np.float32]
_BINS = 20


@dataclass(frozen=True, kw_only=True)
class MeasuredHook:
    """One SAE cut down to the collection's features, on the text."""

    source: LoadedSAE
    sha256: str
    features: list[ImportedFeature]
    form: RowForm
    stats: FeatureStats
    pooled: FloatArray
    """(documents, features)"""
    acts: npt.NDArray[np.float16]
    """(tokens, features), normalised."""


def measure_hook(
    source: LoadedSAE,
    features: list[ImportedFeature],
    activations: Float[Tensor, "tokens d_in"],
    documents: npt.NDArray[np.int64],
    n_documents: int,
    pooling: Pooling,
) -> MeasuredHook:
    """What `features` of one SAE do on the text: thresholds, scales, activations. documents: (tokens,)."""
    indices = [feature.index for feature in features]
    form = row_form(_in_float32(source.sae), activations, indices)
    part = form.sae.select(indices)
    stats = feature_stats(part, activations)
    with source.weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return MeasuredHook(
        source=source,
        sha256=digest,
        features=features,
        form=form,
        stats=stats,
        pooled=pool_documents(part, activations, documents, n_documents, stats.scale, pooling).astype(np.float32),
        acts=encode_tokens(part, activations, list(range(len(indices))), stats.scale),
    )


def bank_rows(hook: MeasuredHook) -> Rows:
    """The features' rows; of an SAE without a decoder, decoder rows of zeros."""
    part = hook.form.sae.select([feature.index for feature in hook.features])
    W_dec = part.W_dec.float().numpy()
    return Rows(
        W_enc=part.W_enc.float().numpy(),
        W_dec=np.zeros_like(W_dec) if part.encoder_only else W_dec,  # a stand-in would steer somewhere
        b_enc=part.b_enc.float().numpy(),
        threshold=part.threshold.float().numpy(),
    )


def imported_records(
    hooks: Sequence[MeasuredHook], heads: Mapping[str, ImportedHead], score: str | None, min_score: float
) -> list[FeatureRecord]:
    """One record a feature in the bank's order. heads: also those without columns, for what was measured."""
    measured: dict[int, dict[str, float]] = {}
    for head in heads.values():
        for column, scores in head.scores.items():
            measured.setdefault(column, {}).update(scores)
    used = {column for head in heads.values() for column in head.columns}
    headed = {domain for domain, head in heads.items() if head.columns}
    records: list[FeatureRecord] = []
    for hook in hooks:
        thresholds = hook.form.sae.threshold.float().tolist()
        for i, feature in enumerate(hook.features):
            column = len(records)
            active = hook.acts[:, i].astype(np.float32)
            active = active[active > 0]
            records.append(
                feature.to_record(
                    hook_name=hook.source.sae.hook_name,
                    threshold=round(thresholds[feature.index], 6),
                    scale=float(hook.stats.scale[i]),
                    density=round(float(hook.stats.density[i]), 8),
                    scores=measured.get(column, {}),
                    quantiles={f"{q:g}": round(float(np.quantile(active, q)), 4) for q in QUANTILES}
                    if len(active)
                    else {},
                    histogram=np.histogram(active.clip(0, 1), bins=_BINS, range=(0, 1))[0].tolist(),
                    admitted=column in used,
                    refusals=[] if column in used else [_refusal(feature, headed, score, min_score)],
                )
            )
    return records


def head_record(head: ImportedHead, records: Sequence[FeatureRecord], deltas: FloatArray) -> HeadRecord:
    """A head's record. deltas: (F,) by what a difference of normalised activations is multiplied."""
    return HeadRecord(
        features=[records[column].id for column in head.columns],
        weights=[1.0] * len(head.columns),
        bias=0.0,
        calibration=head.calibration,
        thresholds=head.thresholds,
        streaming_thresholds=head.streaming_thresholds,
        steering=[round(float(head.difference[i] * deltas[column]), 6) + 0.0 for i, column in enumerate(head.columns)],
    )


def hook_record(hook: MeasuredHook) -> HookRecord:
    """A hook point's record."""
    return HookRecord(
        hook_name=hook.source.sae.hook_name,
        d_in=hook.source.sae.d_in,
        d_sae=hook.source.sae.d_sae,
        n_selected=len(hook.features),
        sae_sha256=hook.sha256,
        fvu=hook.form.fvu,
        l0=hook.form.l0,
        dead_fraction=hook.form.dead_fraction,
        fires_precision=hook.form.fires_precision,
        fires_recall=hook.form.fires_recall,
    )


def _refusal(feature: ImportedFeature, heads: Collection[str], score: str | None, min_score: float) -> str:
    """Why a feature is in no head."""
    if not feature.domains:
        return "it carries no domain's tag"
    if score is not None and feature.scores.get(score, -1.0) < min_score:
        return f"{score} is below {min_score:g}"
    if not any(domain in heads for domain in feature.domains):
        return "its domain has no head"
    return "it does not tell its domain apart on labelled text"


def _in_float32(sae: SAE) -> SAE:
    tensors = {name: getattr(sae, name).float() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    return replace(sae, **tensors)

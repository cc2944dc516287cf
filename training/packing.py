"""The last stages: heads, calibration, explanations, canary, and the bank's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank, Rows, save_bank
from feature_bank.errors import BankError, DataError
from feature_bank.layout import render, scored_positions
from feature_bank.sae import SAE
from feature_bank.schema import Canary, FeatureRecord, HeadRecord, Heads, HookRecord, Pooling, StreamingHead
from feature_bank.taxonomy import DOMAINS
from guard.capture import pad_batch, truncated_forward
from training.activations import FeatureStats, batch_topk_agreement, cached_pooling
from training.calibration import calibrate, document_scores, probability, thresholds
from training.candidates import choose, encode, on_contrasts
from training.corpus import Document
from training.directions import document_means
from training.discovery import auroc_interval, labels
from training.explain.material import MATERIAL_FILE
from training.explain.segmented import segment_text
from training.gathering import gather_material
from training.harvest import Harvest
from training.heads import (
    FittedHead,
    contrast_rows,
    fit_small_heads,
)
from training.records import describe
from training.selected import FeatureKey, Selection, TrainedHook, feature_id
from training.spreading import Spread, here
from training.steering import steering_features, steering_shares
from training.streaming import fit_streaming_head

if TYPE_CHECKING:
    from training.pipeline import Prepared, Preset

FloatArray = npt.NDArray[np.float32]
Report = Callable[[str, int, int, str], None]
DESCRIBED_FOLDER = "described"
CANARY_FEATURES = 32
CANARY_TOLERANCE = 0.2  # bfloat16 moves the activations by a few per cent; another model by far more


def build_bank(
    *,
    model: Any,
    tokenizer: Any,
    preset: Preset,
    prepared: Prepared,
    out: Path,
    work: Path,
    manifest: Mapping[str, Any],
    report: Report,
    spread: Spread = here,
) -> Bank:
    """Choose candidates, describe and judge each, fit heads on those that are admitted, calibrate and write.

    spread: who describes the candidates. What is described is kept under `work` until the bank is written, so that an
    interruption does not cost it.

    Raises DataError if too few features are admitted for any domain's head.
    """
    documents, cache, hooks = prepared.documents, prepared.cache, prepared.hooks
    stats, pooled = pool_hooks(hooks, cache, len(documents), preset.pooling, work, report)
    scales = {name: s.scale for name, s in stats.items()}
    keys = choose(
        pooled,
        documents,
        scales,
        screened=preset.candidates,
        per_head=preset.described_per_head,
        per_steering=preset.described_for_steering,
        report=lambda detail, done: report("candidates", done, len(DOMAINS), detail),
    )
    candidates = encode(hooks, keys, cache, scales)
    report("candidates", 1, 1, f"{len(keys):,} features to describe")
    text = segment_text(cache.token_ids, cache.documents, documents, tokenizer.decode)
    records, judge = describe(
        candidates,
        hooks,
        stats,
        documents,
        cache,
        text,
        pooled,
        prepared.contrasts,
        on_contrasts(hooks, candidates.keys, prepared.contrasts, scales, preset.pooling),
        model,
        tokenizer,
        preset.admission,
        preset.seed,
        report,
        spread=spread,
        kept=work / DESCRIBED_FOLDER / str(manifest["tool_version"]),
    )
    by_key = dict(zip(candidates.keys, records, strict=True))
    admitted = {key: record for key, record in by_key.items() if record.admitted}
    report("admit", 1, 1, f"{len(admitted):,} of {len(keys):,} features admitted")

    fit = fit_guard(hooks, pooled, documents, candidates, cache, admitted, preset, report)
    features = guard_records([by_key[key] for key in fit.selection.keys], fit.heads, fit.selection)
    gather_material(
        work / MATERIAL_FILE,
        fit.selection,
        features,
        text,
        hooks,
        prepared.contrasts,
        scales,
        tokenizer,
        seed=preset.seed,
    )
    report("material", 1, 1, f"{len(features):,} features for `sailguard train explain`")
    rows, hook_records = cut_rows(hooks, fit.selection, cache)
    bank = save_bank(
        out,
        manifest={
            **manifest,
            "hook_points": [r.model_dump() for r in hook_records],
            "canary": make_canary(model, tokenizer, preset, rows, fit.selection, scales).model_dump(),
            "quality": {**fit.quality, **judge, "described": len(keys), "admitted": len(admitted)},
        },
        features=features,
        heads=fit.heads,
        rows=rows,
    )
    shutil.rmtree(work / DESCRIBED_FOLDER, ignore_errors=True)
    report("pack", 1, 1, str(out))
    return bank


class Fit(NamedTuple):
    """Heads over admitted features, and these features' activations."""

    heads: Heads
    selection: Selection
    quality: dict[str, float]


def fit_guard(
    hooks: Sequence[TrainedHook],
    pooled: Mapping[str, npt.NDArray[np.float16]],
    documents: Sequence[Document],
    candidates: Selection,
    cache: Harvest,
    admitted: Mapping[FeatureKey, FeatureRecord],
    preset: Preset,
    report: Report,
) -> Fit:
    """Fit, calibrate and test the domain heads on the admitted candidates alone, and find what steers each domain."""
    fitted = fit_small_heads(
        pooled,
        documents,
        candidates=preset.candidates,
        max_features=preset.features_per_head,
        tolerance=preset.head_tolerance,
        report=lambda detail, done: report("heads", done, len(DOMAINS), detail),
        allowed=admitted,
    )
    report("heads", 1, 1, f"{len(fitted)} domains")
    steering = _steering(fitted, hooks, documents, cache, admitted, preset)
    report("steering", 1, 1, ", ".join(f"{domain}: {len(shares)}" for domain, shares in steering.items()))
    used = {key for head in fitted.values() for key in head.features} | {
        key for part in steering.values() for key in part
    }
    missing = [name for name in pooled if name not in {hook for hook, _ in used}]
    used |= {next(key for key in candidates.keys if key[0] == name) for name in missing}  # a hook point stays
    selection = candidates.subset([key for key in candidates.keys if key in used])
    report("select", 1, 1, f"{len(selection.keys)} features")
    heads, quality = _calibrated(fitted, steering, selection, documents, cache, preset)
    return Fit(heads, selection, quality)


def _steering(
    domains: Collection[str],
    hooks: Sequence[TrainedHook],
    documents: Sequence[Document],
    cache: Harvest,
    admitted: Mapping[FeatureKey, FeatureRecord],
    preset: Preset,
) -> dict[str, dict[FeatureKey, float]]:
    """By domain, the features that steer it with their shares in the mean difference of its contrast rows."""
    steering: dict[str, dict[FeatureKey, float]] = {domain: {} for domain in domains}
    chosen = {domain: steering_features(admitted, domain) for domain in DOMAINS if domain in domains}
    for hook in hooks:
        means = document_means(cache.activations(hook.sae.hook_name), cache.documents, len(documents))
        for domain, features in chosen.items():
            positive, negative = contrast_rows(documents, domain)
            difference = means[positive].mean(0) - means[negative].mean(0)
            steering[domain] |= steering_shares(difference, hook, features, most=preset.steering_features)
    return steering


def guard_records(records: Sequence[FeatureRecord], heads: Heads, selection: Selection) -> list[FeatureRecord]:
    """The records of the features that a bank holds: a domain whose head counts a feature against it is no tag of it,
    and near-duplicates are named only if they are in the bank too."""
    held = {feature_id(key) for key in selection.keys}
    against = {
        (domain, feature)
        for domain, head in heads.heads.items()
        for feature, weight in zip(head.features, head.weights, strict=True)
        if weight < 0
    }
    found = []
    for record in records:
        domains = [domain for domain in record.domains if (domain, record.id) not in against]
        found.append(
            record.model_copy(
                update={
                    "domains": domains,
                    "concepts": [name for name in record.concepts if name.split("/")[0] in domains],
                    "duplicates": [d for d in record.duplicates if d.id in held],
                }
            )
        )
    return found


def cut_rows(
    hooks: Sequence[TrainedHook], selection: Selection, cache: Harvest
) -> tuple[dict[str, Rows], list[HookRecord]]:
    """The selected rows of every hook point's SAE, and how well they stand for it."""
    rows, records = {}, []
    for hook in hooks:
        name = hook.sae.hook_name
        indices = [i for n, i in selection.keys if n == name]
        rows[name] = _rows(hook.sae, indices)
        learnt = [i for i in indices if i < hook.learnt]
        own = hook.sae if not hook.directions else hook.sae.select(range(hook.learnt))
        precision, recall = batch_topk_agreement(own, cache.activations(name), learnt, hook.k)
        records.append(
            HookRecord(
                hook_name=name,
                d_in=hook.sae.d_in,
                d_sae=hook.learnt,
                n_selected=len(indices),
                n_directions=len(indices) - len(learnt),
                sae_sha256=hook.sha256,
                fvu=hook.fvu,
                l0=hook.l0,
                dead_fraction=hook.dead_fraction,
                fires_precision=precision,
                fires_recall=recall,
            )
        )
    return rows, records


def pool_hooks(
    hooks: Sequence[TrainedHook], cache: Harvest, n_documents: int, pooling: Pooling, work: Path, report: Report
) -> tuple[dict[str, FeatureStats], dict[str, npt.NDArray[np.float16]]]:
    """By hook point: every feature's scale and density, and its pooled activation on every document.

    Kept under `work` and read from there the next time.
    """
    stats: dict[str, FeatureStats] = {}
    pooled: dict[str, npt.NDArray[np.float16]] = {}
    for done, hook in enumerate(hooks, 1):
        name = hook.sae.hook_name
        stats[name], pooled[name] = cached_pooling(
            hook.sae,
            partial(cache.activations, name),
            cache.documents,
            n_documents,
            pooling,
            path=work / "pooled" / f"{name}.safetensors",
            fingerprint=hook.digest,
        )
        report("discovery", done, len(hooks), f"{hook.sae.d_sae:,} features at {name}")
    return stats, pooled


def _calibrated(
    fitted: Mapping[str, FittedHead],
    steering: Mapping[str, Mapping[FeatureKey, float]],
    selection: Selection,
    documents: Sequence[Document],
    cache: Harvest,
    preset: Preset,
) -> tuple[Heads, dict[str, float]]:
    """Calibrated heads, and their AUROC on the held-out test split."""
    position = selection.position()
    records: dict[str, HeadRecord] = {}
    quality: dict[str, float] = {}
    for domain, head in fitted.items():
        places = [position[key] for key in head.features]
        streaming = fit_streaming_head(selection.acts[:, places], cache.documents, documents, domain, preset.pooling)
        dense, streaming_dense = (np.zeros(len(selection.keys), dtype=np.float32) for _ in range(2))
        dense[places] = head.weights
        streaming_dense[np.array(places)[streaming.columns]] = streaming.weights
        score = partial(
            document_scores,
            selection.acts,
            cache.documents,
            pooling=preset.pooling,
            n_documents=len(documents),
        )
        scores = score(weights=dense, bias=head.bias)
        streamed = score(weights=streaming_dense, bias=streaming.bias, streaming=True)
        rows, y = _scored(scores, *labels(documents, domain, ("calibration",)))
        try:
            calibration, streaming_calibration = (calibrate(s[rows], y) for s in (scores, streamed))
        except DataError as e:
            raise DataError(f"domain {domain!r}: {e}") from e
        sources = [documents[row].source for row in rows]
        keys = sorted({*head.features, *steering[domain]}, key=position.__getitem__)
        at = [position[key] for key in keys]
        records[domain] = HeadRecord(
            features=[feature_id(key) for key in keys],
            weights=[round(float(w), 6) for w in dense[at]],
            bias=head.bias,
            calibration=calibration,
            thresholds=thresholds(probability(scores[rows], calibration), y, sources),
            streaming_thresholds=thresholds(probability(streamed[rows], streaming_calibration), y, sources),
            steering=[round(steering[domain].get(key, 0.0), 6) for key in keys],
            streaming=StreamingHead(
                weights=[round(float(w), 6) for w in streaming_dense[at]],
                bias=streaming.bias,
                calibration=streaming_calibration,
            ),
        )
        rows, y = _scored(scores, *labels(documents, domain, ("test",)))
        if 0 < y.sum() < len(y):
            quality[f"test_auroc_{domain}"] = round(auroc_interval(scores[rows], y, seed=preset.seed).value, 4)
    return Heads.model_validate({"pooling": preset.pooling, "heads": records}), quality


def _scored(
    scores: FloatArray, rows: npt.NDArray[np.int64], y: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Only the documents of which a token was scored."""
    has = np.isfinite(scores[rows])
    return rows[has], y[has]


def _rows(sae: SAE, indices: list[int]) -> Rows:
    if sae.encoder_only:
        raise BankError(
            "only the encoder of this SAE was published, and a bank's rows are what a policy steers with", field="W_dec"
        )
    part = sae.select(indices)
    return Rows(
        W_enc=part.W_enc.numpy(),
        W_dec=part.W_dec.numpy(),
        b_enc=part.b_enc.numpy(),
        threshold=part.threshold.numpy(),
    )


def make_canary(
    model: Any,
    tokenizer: Any,
    preset: Preset,
    rows: Mapping[str, Rows],
    selection: Selection,
    scales: Mapping[str, FloatArray],
) -> Canary:
    """Record what the bank's rows, as they will be stored, give on the preset's text."""
    rendered = render(tokenizer, preset.canary.strip(), "passage", max_tokens=256)
    ids, mask = pad_batch([rendered.ids], 0, next(model.parameters()).device)
    hidden = truncated_forward(model, list(rows), ids, mask)
    positions = scored_positions(rendered, tokenizer.all_special_ids)
    parts = []
    for name, part in rows.items():
        x = hidden[name][0, positions].float().cpu().numpy()
        pre = x @ part.W_enc.astype(np.float16).astype(np.float32) + part.b_enc
        scale = np.array([scales[n][i] for n, i in selection.keys if n == name], dtype=np.float32)
        parts.append(np.where(pre > part.threshold, pre, 0).mean(0) / scale)
    means = np.concatenate(parts)
    strongest = np.argsort(-means, kind="stable")[:CANARY_FEATURES]
    return Canary(
        text=preset.canary.strip(),
        activations={feature_id(selection.keys[i]): round(float(means[i]), 6) for i in strongest},
        tolerance=CANARY_TOLERANCE,
    )

"""The readable side of the bank: one record a feature, with its scores, terms, excerpts and explanation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from feature_bank.layout import content_ids
from feature_bank.schema import FeatureRecord, Heads
from guard.hook_points import parse_hook_name
from training.activations import QUANTILES, FeatureStats
from training.corpus import OWN_SOURCE, Document
from training.discovery import auroc_interval, labels
from training.explain.terms import TermTable, describe, evidence, trigger_tokens
from training.harvest import Harvest
from training.selected import Selection, TrainedHook, feature_id

Report = Callable[[str, int, int, str], None]
STRONG = 0.3  # of a feature's 99.9th percentile


def feature_records(
    selection: Selection,
    heads: Heads,
    hooks: Sequence[TrainedHook],
    stats: Mapping[str, FeatureStats],
    documents: Sequence[Document],
    cache: Harvest,
    pooled: Mapping[str, npt.NDArray[np.float16]],
    model: Any,
    tokenizer: Any,
    seed: int,
    report: Report,
) -> list[FeatureRecord]:
    """One record a selected feature: scores against nulls, terms, excerpts, and the sentence made of them."""
    strong = selection.acts > STRONG  # weak activations are noise to a reader
    fires = sparse.csr_matrix(strong)
    showable = _showable_tokens(documents, tokenizer)
    triggers = trigger_tokens(fires, cache.token_ids, showable, top=8)
    by_document = _top_documents(np.stack([pooled[name][:, i] for name, i in selection.keys], axis=1))
    ngrams = TermTable(documents).contrast(by_document, top=8)
    promoted = _promoted(model, hooks, selection, showable)
    own = np.flatnonzero([documents[d].source == OWN_SOURCE and documents[d].split != "test" for d in cache.documents])
    weight_of = {
        (domain, feature): weight
        for domain, head in heads.heads.items()
        for feature, weight in zip(head.features, head.weights, strict=True)
    }
    saes = {hook.sae.hook_name: hook.sae for hook in hooks}
    label_sets = {domain: labels(documents, domain, ("discovery", "calibration")) for domain in heads.heads}
    records = []
    for i, key in enumerate(selection.keys):
        name, index = key
        column = selection.acts[:, i].astype(np.float32)
        scores: dict[str, float] = {}
        domains = []
        for domain, (rows, y) in label_sets.items():
            interval = auroc_interval(pooled[name][rows, index].astype(np.float32), y, seed=seed)
            for suffix, value in (
                ("", interval.value),
                ("_low", interval.low),
                ("_high", interval.high),
                ("_null", interval.null),
            ):
                scores[f"auroc_{domain}{suffix}"] = round(value, 4)
            if weight_of.get((domain, feature_id(key)), 0.0) > 0 and interval.low > max(0.5, interval.null):
                domains.append(domain)
        active = column[column > 0]
        shown = {t.text for t in triggers[i]}
        on_shown = np.isin(cache.token_ids, [t for t, text in showable.items() if text.strip() in shown])
        records.append(
            FeatureRecord(
                id=feature_id(key),
                hook_name=name,
                layer=parse_hook_name(name).layer,
                index=index,
                domains=domains,
                explanation=describe(
                    triggers[i],
                    ngrams[i],
                    domains,
                    float((on_shown & strong[:, i]).sum() / max(int(strong[:, i].sum()), 1)),
                ),
                trigger_tokens=triggers[i],
                ngrams=ngrams[i],
                promoted_tokens=promoted[i],
                scores=scores,
                threshold=round(float(saes[name].threshold[index]), 6),
                scale=float(stats[name].scale[index]),
                density=round(float(stats[name].density[index]), 8),
                quantiles={f"{q:g}": round(float(np.quantile(active, q)), 4) for q in QUANTILES} if len(active) else {},
                evidence=evidence(column[own], own, cache.token_ids, cache.documents, tokenizer.decode, top=3),
            )
        )
        if (i + 1) % 25 == 0 or i + 1 == len(selection.keys):
            report("explain", i + 1, len(selection.keys), feature_id(key))
    return records


def _top_documents(pooled: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """(n_documents, F): per feature the tenth of the documents it fires in where its mean is highest (20 to 300).

    All documents with any firing would be little more than the long ones.
    """
    chosen = np.zeros(pooled.shape, dtype=bool)
    for feature in range(pooled.shape[1]):
        column = pooled[:, feature].astype(np.float32)
        firing = int((column > 0).sum())
        kept = min(firing, int(np.clip(firing // 10, 20, 300)))
        if kept:
            chosen[np.argsort(-column, kind="stable")[:kept], feature] = True
    return chosen


def _showable_tokens(documents: Sequence[Document], tokenizer: Any) -> dict[int, str]:
    """The tokens of the text written for the project: no others are named in explanations."""
    own = (d.text for d in documents if d.source == OWN_SOURCE and d.split != "test")
    ids = {t for text in own for t in content_ids(tokenizer, text)}
    decoded = {t: str(tokenizer.decode([t])) for t in ids}
    return {t: text for t, text in decoded.items() if text.strip() and "\ufffd" not in text}


@torch.inference_mode()
def _promoted(
    model: Any,
    hooks: Sequence[TrainedHook],
    selection: Selection,
    showable: Mapping[int, str],
    *,
    top: int = 6,
) -> list[list[str]]:
    """Logit lens: the tokens whose logits each decoder row raises most, through the final norm's gain."""
    unembed = model.get_output_embeddings().weight.float().cpu()
    gain = model.get_submodule("model.norm").weight.float().cpu()
    ids = torch.tensor(sorted(showable), dtype=torch.long)
    if ids.numel() == 0:
        return [[] for _ in selection.keys]
    saes = {hook.sae.hook_name: hook.sae for hook in hooks}
    decoder = torch.stack([saes[name].W_dec[i] for name, i in selection.keys]).float()
    logits = (decoder * gain) @ (unembed - unembed.mean(0))[ids].T
    best = logits.topk(min(top, ids.numel()), dim=1).indices
    return [[showable[int(ids[j])].strip() for j in row] for row in best]

"""The readable side of the bank: one record a feature, with its explanation and each field that admission asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from feature_bank.layout import content_ids
from feature_bank.schema import Causality, FeatureRecord
from guard.hook_points import parse_hook_name
from training.activations import QUANTILES, FeatureStats
from training.admission import AdmissionRules, refusals
from training.candidates import ContrastActs, Contrasts, near_duplicates
from training.causality import TEXTS, TextModel, ablation_effects, fit_judge
from training.concepts import concept_scores
from training.corpus import OWN_SOURCE, Document
from training.detection import detected, detection_scores
from training.excerpts import excerpts
from training.explain.executable import explain_features
from training.explain.segmented import SegmentedText
from training.harvest import Harvest
from training.selected import FeatureKey, Selection, TrainedHook, feature_id
from training.simulation.fidelity import score_features
from training.spreading import Spread, here

Report = Callable[[str, int, int, str], None]
BINS = 20


def describe(
    selection: Selection,
    hooks: Sequence[TrainedHook],
    stats: Mapping[str, FeatureStats],
    documents: Sequence[Document],
    cache: Harvest,
    text: SegmentedText,
    pooled: Mapping[str, npt.NDArray[np.float16]],
    contrasts: Contrasts,
    on_pairs: ContrastActs,
    model: Any,
    tokenizer: Any,
    rules: AdmissionRules,
    seed: int,
    report: Report,
    *,
    spread: Spread = here,
    kept: Path | None = None,
) -> tuple[list[FeatureRecord], dict[str, float]]:
    """One record a feature of `selection`, judged by `rules`; and the causal judge's own AUROC by domain.

    spread: who ablates, explains and scores the features, a few at a time. kept: where this is kept until all is done,
    see `work_off`.
    """
    keys, acts = selection.keys, selection.acts
    scores = detection_scores(
        np.stack([pooled[name][:, i] for name, i in keys], axis=1).astype(np.float32),
        documents,
        on_pairs.pooled,
        contrasts.texts,
        seed=seed,
    )
    domains = detected(scores, documents)
    report("detect", 1, 1, f"{sum(map(bool, domains)):,} of {len(keys):,} features find a domain by themselves")
    concepts = concept_scores(on_pairs.fired, contrasts.texts.pairs)
    duplicates = near_duplicates(selection)
    showable = showable_tokens([*documents, *contrasts.texts.documents], tokenizer)
    promoted = _promoted(model, hooks, keys, showable)
    causality, judge = _causality(keys, hooks, domains, on_pairs, contrasts, model, tokenizer, report, spread, kept)

    explained = explain_features(
        acts, keys, text, contrasts.taxonomy, tokenizer, seed=seed, report=report, spread=spread, kept=kept
    )
    predicates = [e.explanation.predicate for e in explained if e.explanation.predicate is not None]
    fidelity = score_features(
        acts, keys, predicates, text, contrasts.taxonomy, seed=seed, report=report, spread=spread, kept=kept
    )

    own = np.flatnonzero([documents[d].source == OWN_SOURCE and documents[d].split != "test" for d in cache.documents])
    own_ids, own_documents = cache.token_ids[own], cache.documents[own]
    by_name = {hook.sae.hook_name: hook for hook in hooks}
    records = []
    for i, key in enumerate(keys):
        name, index = key
        column = acts[:, i].astype(np.float32)
        active = column[column > 0]
        record = FeatureRecord(
            id=feature_id(key),
            hook_name=name,
            layer=parse_hook_name(name).layer,
            index=index,
            domains=domains[i],
            direction=by_name[name].direction(index),
            explanation=explained[i].explanation.text,
            explainer=explained[i].explanation.explainer,
            predicate=explained[i].explanation.predicate,
            kind=explained[i].kind,
            lexicality=explained[i].lexicality,
            trigger_tokens=explained[i].trigger_tokens,
            ngrams=explained[i].ngrams,
            fidelity=fidelity[i],
            concepts=[f"{c.domain}/{c.concept}" for c in concepts[i] if c.domain in domains[i]],
            promoted_tokens=promoted[i],
            scores=scores[i],
            concept_scores=concepts[i],
            causality=causality.get(key),
            duplicates=duplicates[i],
            threshold=round(float(by_name[name].sae.threshold[index]), 6),
            scale=float(stats[name].scale[index]),
            density=round(float(stats[name].density[index]), 8),
            quantiles={f"{q:g}": round(float(np.quantile(active, q)), 4) for q in QUANTILES} if len(active) else {},
            histogram=np.histogram(np.minimum(active, 1.0), bins=BINS, range=(0.0, 1.0))[0].tolist(),
            evidence=excerpts(column[own], own_ids, own_documents, tokenizer.decode, top=3),
        )
        failed = refusals(record, rules)
        records.append(record.model_copy(update={"refusals": failed, "admitted": not failed}))
        if (i + 1) % 50 == 0 or i + 1 == len(keys):
            report("records", i + 1, len(keys), feature_id(key))
    return records, judge


def _causality(
    keys: Sequence[FeatureKey],
    hooks: Sequence[TrainedHook],
    domains: Sequence[Sequence[str]],
    on_pairs: ContrastActs,
    contrasts: Contrasts,
    model: Any,
    tokenizer: Any,
    report: Report,
    spread: Spread,
    kept: Path | None,
) -> tuple[dict[FeatureKey, Causality], dict[str, float]]:
    """What ablating each feature that finds a domain does; features that find none are left out."""
    reader = TextModel(model, tokenizer, contrasts.texts, [hook.sae.hook_name for hook in hooks])
    judge, means = fit_judge(reader, contrasts.texts)
    tagged = [i for i, found in enumerate(domains) if found]
    effects = ablation_effects(
        reader,
        judge,
        means,
        {hook.sae.hook_name: hook.sae for hook in hooks},
        [keys[i] for i in tagged],
        [on_pairs.strongest(i, TEXTS) for i in tagged],
        lambda done, total, detail: report("ablate", done, total, detail),
        spread=spread,
        kept=kept,
    )
    return effects, {f"judge_auroc_{domain}": value for domain, value in judge.test_auroc.items()}


def showable_tokens(documents: Sequence[Document], tokenizer: Any) -> dict[int, str]:
    """The tokens of the text written for the project: no others are named in explanations."""
    own = (d.text for d in documents if d.source == OWN_SOURCE and d.split != "test")
    ids = {t for text in own for t in content_ids(tokenizer, text)}
    decoded = {t: str(tokenizer.decode([t])) for t in ids}
    return {t: text for t, text in decoded.items() if text.strip() and "\ufffd" not in text}


@torch.inference_mode()
def _promoted(
    model: Any,
    hooks: Sequence[TrainedHook],
    keys: Sequence[FeatureKey],
    showable: Mapping[int, str],
    *,
    top: int = 6,
) -> list[list[str]]:
    """Logit lens: the tokens whose logits each decoder row raises most, through the final norm's gain."""
    unembed = model.get_output_embeddings().weight.float().cpu()
    gain = model.get_submodule("model.norm").weight.float().cpu()
    ids = torch.tensor(sorted(showable), dtype=torch.long)
    if ids.numel() == 0:
        return [[] for _ in keys]
    saes = {hook.sae.hook_name: hook.sae for hook in hooks}
    decoder = torch.stack([saes[name].W_dec[i] for name, i in keys]).float()
    logits = (decoder * gain) @ (unembed - unembed.mean(0))[ids].T
    best = logits.topk(min(top, ids.numel()), dim=1).indices
    return [[showable[int(ids[j])].strip() for j in row] for row in best]

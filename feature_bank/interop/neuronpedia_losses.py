"""What of a bank has no place in Neuronpedia's layout, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from feature_bank.bank import Bank
from feature_bank.interop.records import Loss
from feature_bank.schema import Evidence, FeatureRecord

__all__ = ["BANK_LOSSES", "EXPORTED", "LOST", "export_losses"]

EXPORTED = frozenset(
    {"id", "hook_name", "layer", "index", "explanation", "explainer", "density", "histogram", "evidence"}
)
"""Fields of a feature that have a place in the layout."""

LOST: Mapping[str, str] = {
    "domains": "features carry no tags there",
    "concepts": "features carry no tags there",
    "predicate": "an explanation is text there, nothing that can be run",
    "kind": "there is no place for it",
    "direction": "there is no place for it: a direction is written as a feature like others",
    "lexicality": "there is no place for it",
    "trigger_tokens": "there is no place for terms; the explanation names them",
    "ngrams": "there is no place for terms; the explanation names them",
    "promoted_tokens": "each token needs its logit there, and a bank keeps the tokens alone",
    "scores": "there is no place for detection scores",
    "fidelity": "scores of explanations are no part of the export",
    "concept_scores": "there is no place for it",
    "causality": "there is no place for it",
    "admitted": "whether a feature is in the guard has no place there",
    "refusals": "whether a feature is in the guard has no place there",
    "duplicates": "neighbours are numbered within one source there, and these lie in any layer",
    "threshold": "encoders are no part of the layout",
    "scale": "activations are in their own units there, and nothing says by what they were divided",
    "quantiles": "there is no place for them beside the histogram",
}
"""Fields of a feature that have none, and why."""

BANK_LOSSES: Mapping[str, str] = {
    "heads": "domain heads, calibration and thresholds have no place there",
    "weights": "encoder rows, biases and thresholds have no place there",
    "canary": "there is no place for it",
    "corpora": "only the names of the corpora are kept; licences, hashes and sizes are not",
    "hook_points": "an SAE's hash and quality have no place there",
    "quality": "there is no place for it",
    "identity": "of the model, its hashes and revision are not kept",
    "reviews": "votes there are no reviews",
}


def export_losses(bank: Bank, *, reviews: int = 0) -> Iterator[Loss]:
    """What of a bank an export leaves behind; `reviews` is how many of them it has."""
    for field, reason in LOST.items():
        default = FeatureRecord.model_fields[field].get_default(call_default_factory=True)
        count = sum(getattr(feature, field) != default for feature in bank.features)
        if count:
            yield Loss(field=field, count=count, reason=reason)
    explained = [f.explainer for f in bank.features if f.explainer is not None]
    if count := sum(e.prompt_sha256 is not None or e.seed is not None for e in explained):
        yield Loss(field="explainer", count=count, reason="of an explainer, only method and model are kept")
    if count := sum(f.explainer is not None and not f.explanation for f in bank.features):
        yield Loss(field="explainer", count=count, reason="there is no row without a text")
    evidence = [(f, e) for f in bank.features for e in f.evidence]
    if count := sum(not e.tokens for _, e in evidence):
        yield Loss(field="evidence", count=count, reason="an excerpt is tokens with activations there; these have none")
    if count := sum(bool(e.tokens) and not _follows(e) for _, e in evidence):
        yield Loss(field="evidence", count=count, reason="text, peak and height are taken from the tokens there")
    counts = {
        "heads": len(bank.heads),
        "weights": len(bank.rows),
        "canary": 1,
        "corpora": len(bank.manifest.corpus),
        "hook_points": len(bank.manifest.hook_points),
        "quality": len(bank.manifest.quality),
        "identity": 1,
        "reviews": reviews,
    }
    for field, reason in BANK_LOSSES.items():
        if counts[field]:
            yield Loss(field=f"bank.{field}", count=counts[field], reason=reason)


def _follows(evidence: Evidence) -> bool:
    """Whether an excerpt's text, peak and height are those that its tokens tell."""
    height = max(evidence.activations)
    peak = evidence.tokens[evidence.activations.index(height)]
    return (evidence.text, evidence.peak, evidence.activation) == ("".join(evidence.tokens), peak, height)

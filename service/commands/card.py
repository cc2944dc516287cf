"""`bank show`: all that is recorded of one feature, as a card on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from feature_bank.errors import BankError
from service.commands.bank_reader import read_labelled
from service.commands.collections import collection_at, show_collection
from service.commands.features import feature_json
from service.commands.options import BankArgument, JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from feature_bank.bank import Bank
    from feature_bank.review import EffectiveLabel, Review
    from feature_bank.schema import Evidence, FeatureRecord, SimulationScore

__all__ = ["print_card", "review_line", "show"]


def show(
    feature_id: Annotated[str, typer.Argument(metavar="FEATURE", help="Such as L14/123.")],
    path: BankArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that a bank records of one feature, and its reviews; or what its publisher says, in a collection."""
    collection = collection_at(path)
    if collection is not None:
        show_collection(collection, feature_id, as_json)
        return
    bank, log, labels = read_labelled(path)
    feature = bank.by_id.get(feature_id)
    if feature is None:
        raise BankError(
            f"the bank has no feature {feature_id!r}; `sailguard bank list` names them",
            file="features.jsonl",
            field="id",
        )
    reviews = [review for review in log.reviews if review.feature == feature_id]
    label = labels[feature_id]
    if as_json:
        history = [review.model_dump(exclude_none=True) for review in reviews]
        print_json(feature_json(feature, label) | {"in_heads": _weights(bank, feature_id), "reviews": history})
        return
    print_card(output_console(), bank, feature, label, reviews)


def print_card(
    console: Console, bank: Bank, feature: FeatureRecord, label: EffectiveLabel, reviews: Sequence[Review]
) -> None:
    """Print what is recorded of a feature, its evidence with the peaks highlighted, and its reviews."""
    from rich.text import Text

    for name, value in _facts(bank, feature, label):
        if value:
            console.print(f"{name:<12} {plain(value)}", markup=False, soft_wrap=True)
    for evidence in feature.evidence:
        lead = f"{'evidence':<12} {evidence.activation:.2f} at {plain(evidence.peak)!r}: "
        console.print(Text(lead) + _highlighted(evidence), soft_wrap=True)
    for review in reviews:
        console.print(f"{'said':<12} {review_line(review, bank)}", markup=False, soft_wrap=True)


def review_line(review: Review, bank: Bank) -> str:
    """A review in one line of plain text."""
    parts = [f"{review.time[:19]}Z {review.verdict} by {review.reviewer}"]
    if review.content_hash != bank.content_hash:
        parts.append(f"at {review.bank}")
    if review.overrides is not None:
        changed = review.overrides.model_dump(exclude_none=True)
        parts += [f"{name}: {_listed(v) if isinstance(v, list) else v}" for name, v in changed.items()]
    if review.reason:
        parts.append(review.reason)
    return plain("; ".join(parts))


def _facts(bank: Bank, feature: FeatureRecord, label: EffectiveLabel) -> Iterator[tuple[str, str]]:
    yield "feature", f"{feature.id} at {feature.hook_name}"
    yield "direction", f"of {feature.direction}, fitted to labels" if feature.direction else ""
    if label.status != "unreviewed":
        yield "review", f"{label.status} by {label.reviewer}, {label.time}"
    yield "explanation", label.explanation
    if label.explanation != feature.explanation:
        yield "machine's", feature.explanation
    if feature.explainer is not None:
        by = feature.explainer
        yield "explainer", by.method + (f" {by.model}" if by.model else "")
    if feature.predicate is not None:
        terms = "; ".join(f"{t.weight:+.2f} {t.kind} {t.text!r}" for t in feature.predicate.terms)
        yield "predicate", f"log-odds {feature.predicate.bias:+.2f}; {terms}"
    yield "domains", _listed(label.domains)
    if label.domains != tuple(feature.domains):
        yield "machine's", _listed(feature.domains)
    yield "concepts", ", ".join(label.concepts)
    if label.concepts != tuple(feature.concepts):
        yield "machine's", _listed(feature.concepts)
    if feature.kind is not None:
        share = "" if feature.lexicality is None else f" (the token alone explains {feature.lexicality:.0%})"
        yield "kind", feature.kind + share
    yield "admitted", "no: " + ("; ".join(feature.refusals) or "no rule is named") if not feature.admitted else "yes"
    yield "fires on", f"{feature.density:.4%} of the corpus's tokens, above {feature.threshold:.4g}"
    yield "scale", f"{feature.scale:.4g} (99.9th percentile)"
    yield "in heads", ", ".join(f"{d} {w:+.3g}" for d, w in _weights(bank, feature.id).items())
    for score in feature.fidelity:
        yield "fidelity", _fidelity(score)
    yield "scores", ", ".join(f"{name} {value:.3f}" for name, value in feature.scores.items())
    for concept in feature.concept_scores:
        yield (
            "tells apart",
            f"{concept.domain}/{concept.concept} {concept.frequency:.2f} of {concept.pairs} pairs "
            f"(the other way round {concept.reverse:.2f}, q {concept.q:.2g})",
        )
    if (cause := feature.causality) is not None:
        missing = float("nan")
        changes = (
            f"{d} {effect:+.3f} [{cause.low.get(d, missing):+.3f}, {cause.high.get(d, missing):+.3f}]"
            for d, effect in cause.effects.items()
        )
        yield "ablated", f"{', '.join(changes)} (logits, over {cause.texts} texts)"
    yield "fires with", ", ".join(f"{d.id} (correlation {d.correlation:.2f})" for d in feature.duplicates)
    yield "quantiles", ", ".join(f"{name} {value:.3g}" for name, value in feature.quantiles.items())
    yield "triggers", ", ".join(f"{t.text!r} (z {t.z:.1f}, {t.documents} documents)" for t in feature.trigger_tokens)
    yield "n-grams", ", ".join(f"{t.text!r} (z {t.z:.1f}, {t.documents} documents)" for t in feature.ngrams)
    yield "promotes", ", ".join(map(repr, feature.promoted_tokens))


def _fidelity(score: SimulationScore) -> str:
    interval = f"[{score.corr_low:.3f}, {score.corr_high:.3f}]"
    parts = [
        f"{score.level} level by {score.simulator}: corr {score.corr:.3f} {interval}",
        f"null {score.corr_null:.3f} (mean {score.corr_null_mean:.3f})",
    ]
    others = {"AUROC": score.auroc, "balanced accuracy": score.balanced_accuracy, "PR-AUC": score.pr_auc}
    parts += [f"{name} {value:.3f}" for name, value in others.items() if value is not None]
    parts.append(f"n {score.n}" + (f", {score.missing} missing" if score.missing else ""))
    return ", ".join(parts)


def _highlighted(evidence: Evidence) -> Text:
    """The excerpt with its peak in reverse, and other tokens on which the feature fires underlined."""
    from rich.text import Text

    if evidence.tokens:
        text, peak = Text(), max(evidence.activations)
        for token, activation in zip(evidence.tokens, evidence.activations, strict=True):
            style = "" if activation <= 0 else "bold reverse" if activation == peak else "underline"
            text.append(plain(token), style=style)
        return text
    text = Text(plain(evidence.text))
    peak_text = plain(evidence.peak).strip()
    if peak_text and (start := text.plain.find(peak_text)) >= 0:
        text.stylize("bold reverse", start, start + len(peak_text))
    return text


def _weights(bank: Bank, feature_id: str) -> dict[str, float]:
    return {
        domain: head.weights[head.features.index(feature_id)]
        for domain, head in bank.heads.items()
        if feature_id in head.features
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"

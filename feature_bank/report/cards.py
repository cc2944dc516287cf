"""What a feature's card shows, laid out from its record."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from feature_bank.bank import Bank
from feature_bank.report.charts import AUROC, CORRELATION, Axis, Strip, bars_path, strip
from feature_bank.report.reviews import ReviewLine, Reviews, in_force
from feature_bank.schema import ConceptScore, Evidence, FeatureRecord, SimulationScore
from feature_bank.taxonomy import DOMAINS, Domain

__all__ = ["Card", "Run", "best_auroc", "main_fidelity", "make_cards", "split_runs"]

LEVELS = 5
"""Shades by which a token's activation is shown."""
_CONCEPTS = 6  # of those that a feature tells apart; the record has them all


@dataclass(frozen=True, kw_only=True)
class Run:
    """A piece of an excerpt: one token on which the feature fires, or all the text up to the next."""

    text: str
    level: int = 0
    """0 where it does not fire, up to 5 at the activation 1 and above."""
    activation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A text on which the feature fires."""

    runs: tuple[Run, ...]
    activation: float
    peak: str
    """The token where it peaks, if the runs do not show it; otherwise empty."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well the feature alone finds a domain."""

    domain: Domain
    own: bool
    auroc: float
    low: float | None
    high: float | None
    null: float | None
    tpr: float | None
    lookalike_fpr: float | None
    strip: Strip


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What ablating the feature does to a domain's score."""

    domain: Domain
    own: bool
    value: float
    low: float | None
    high: float | None
    strip: Strip


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A term of the predicate, with a bar from the middle."""

    kind: str
    text: str
    weight: float
    bar: float
    """0 to 50, of the largest weight on the card."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One feature."""

    record: FeatureRecord
    """With the labels that hold."""
    machine: FeatureRecord | None
    """As the machine labelled it, if a review says otherwise."""
    order: int
    weights: tuple[tuple[str, float], ...]
    """Of the heads that it is in."""
    excerpts: tuple[Excerpt, ...]
    histogram: str
    fired: int
    """Tokens that the histogram counts."""
    threshold_at: float
    terms: tuple[WeightedTerm, ...]
    bias: float | None
    detection: tuple[Detection, ...]
    fidelity: tuple[tuple[SimulationScore, Strip], ...]
    effects: tuple[Effect, ...]
    concepts: tuple[ConceptScore, ...]
    more_concepts: int
    duplicates: tuple[tuple[str, float, bool], ...]
    """Ids, correlations, and whether the other is in this bank."""
    reviews: tuple[ReviewLine, ...]
    auroc: float | None
    """The best of its domains."""
    corr: float | None
    effect: float | None
    """The strongest fall of one of its domains' scores, as a negative number."""

    @property
    def rates(self) -> bool:
        """Whether the record tells what share of texts it finds."""
        return any(row.tpr is not None or row.lookalike_fpr is not None for row in self.detection)

    @property
    def rarity(self) -> str:
        """How often it fires, in words."""
        if self.record.density <= 0:
            return "never"
        return f"1 token in {max(1, round(1 / self.record.density)):,}"

    @property
    def verdict(self) -> str:
        """`accepted` or `rejected` by the last review that is no note; empty if there is none."""
        last = next((line for line in reversed(self.reviews) if line.verdict != "note"), None)
        return "" if last is None else "rejected" if last.verdict == "reject" else "accepted"


def make_cards(bank: Bank, reviews: Reviews) -> tuple[Card, ...]:
    """A card for every feature of the bank, in its order."""
    reach = _largest_effect(bank.features)
    weights: dict[str, list[tuple[str, float]]] = {}
    for domain, head in bank.heads.items():
        for feature_id, weight in zip(head.features, head.weights, strict=True):
            weights.setdefault(feature_id, []).append((domain, weight))
    return tuple(
        _card(
            record,
            order=order,
            weights=weights.get(record.id, ()),
            known=bank.by_id,
            reviews=reviews.get(record.id, ()),
            effect_axis=Axis(-reach, reach),
        )
        for order, record in enumerate(bank.features)
    )


def split_runs(evidence: Evidence) -> tuple[Run, ...]:
    """An excerpt in pieces, those where the feature fires apart. Without tokens, its peak is found in the text."""
    if not evidence.tokens:
        before, peak, after = evidence.text.partition(evidence.peak) if evidence.peak else (evidence.text, "", "")
        if not peak or peak in after:  # not there, or it is not known which one is meant
            return (Run(text=evidence.text),)
        runs = [Run(text=before), Run(text=peak, level=_level(evidence.activation), activation=evidence.activation)]
        return (*runs, Run(text=after)) if after else tuple(runs)
    pieces: list[Run] = []
    for token, activation in zip(evidence.tokens, evidence.activations, strict=True):
        if level := _level(activation):
            pieces.append(Run(text=token, level=level, activation=activation))
        elif pieces and not pieces[-1].level:
            pieces[-1] = Run(text=pieces[-1].text + token)
        else:
            pieces.append(Run(text=token))
    return tuple(pieces)


def main_fidelity(record: FeatureRecord) -> SimulationScore | None:
    """The score that stands for the explanation: the first at segment level, else the first there is."""
    segments = [score for score in record.fidelity if score.level == "segment"]
    return next(iter(segments or record.fidelity), None)


def best_auroc(record: FeatureRecord) -> float | None:
    """How well the feature alone finds one of its domains, the best of them."""
    found = (record.scores.get(f"auroc_{domain}") for domain in record.domains)
    return max((value for value in found if value is not None), default=None)


def _card(
    machine: FeatureRecord,
    *,
    order: int,
    weights: Sequence[tuple[str, float]],
    known: Collection[str],
    reviews: tuple[ReviewLine, ...],
    effect_axis: Axis,
) -> Card:
    record = in_force(machine, reviews)
    main = main_fidelity(record)
    effects = record.causality.effects if record.causality else {}
    own_effects = [effects[domain] for domain in record.domains if domain in effects]
    return Card(
        record=record,
        machine=machine if record is not machine else None,
        order=order,
        weights=tuple(weights),
        excerpts=tuple(_excerpt(evidence) for evidence in record.evidence),
        histogram=bars_path(record.histogram, log=True),
        fired=sum(record.histogram),
        threshold_at=Axis(0.0, 1.0).place(record.threshold / record.scale),
        terms=_terms(record),
        bias=record.predicate.bias if record.predicate else None,
        detection=tuple(_detection(record, domain) for domain in DOMAINS if f"auroc_{domain}" in record.scores),
        fidelity=tuple(
            (s, strip(CORRELATION, s.corr, low=s.corr_low, high=s.corr_high, null=s.corr_null)) for s in record.fidelity
        ),
        effects=tuple(_effect(record, domain, effect_axis) for domain in DOMAINS if domain in effects),
        concepts=tuple(record.concept_scores[:_CONCEPTS]),
        more_concepts=max(0, len(record.concept_scores) - _CONCEPTS),
        duplicates=tuple((other.id, other.correlation, other.id in known) for other in record.duplicates),
        reviews=reviews,
        auroc=_short(best_auroc(record)),
        corr=_short(main.corr if main else None),
        effect=_short(min(own_effects, default=None)),
    )


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _level(activation: float) -> int:
    return max(0, min(LEVELS, math.ceil(activation * LEVELS)))


def _excerpt(evidence: Evidence) -> Excerpt:
    runs = split_runs(evidence)
    shown = any(run.level for run in runs)
    return Excerpt(runs=runs, activation=evidence.activation, peak="" if shown else evidence.peak)


def _terms(record: FeatureRecord) -> tuple[WeightedTerm, ...]:
    if record.predicate is None:
        return ()
    terms = sorted(record.predicate.terms, key=lambda term: -abs(term.weight))
    largest = max((abs(term.weight) for term in terms), default=0.0) or 1.0
    return tuple(
        WeightedTerm(kind=t.kind, text=t.text, weight=t.weight, bar=round(50 * abs(t.weight) / largest, 1))
        for t in terms
    )


def _detection(record: FeatureRecord, domain: Domain) -> Detection:
    scores: Mapping[str, float] = record.scores
    name = f"auroc_{domain}"
    low, high, null = (scores.get(f"{name}_{part}") for part in ("low", "high", "null"))
    return Detection(
        domain=domain,
        own=domain in record.domains,
        auroc=scores[name],
        low=low,
        high=high,
        null=null,
        tpr=scores.get(f"tpr_{domain}"),
        lookalike_fpr=scores.get(f"lookalike_fpr_{domain}"),
        strip=strip(AUROC, scores[name], low=low, high=high, null=null, zero=0.5),
    )


def _effect(record: FeatureRecord, domain: Domain, axis: Axis) -> Effect:
    assert record.causality is not None
    value = record.causality.effects[domain]
    low, high = record.causality.low.get(domain), record.causality.high.get(domain)
    return Effect(
        domain=domain,
        own=domain in record.domains,
        value=value,
        low=low,
        high=high,
        strip=strip(axis, value, low=low, high=high),
    )


def _largest_effect(features: Sequence[FeatureRecord]) -> float:
    """The reach of an axis on which all cards' effects can be compared; outliers end at its edge."""
    sizes = sorted(abs(value) for f in features if f.causality for value in f.causality.effects.values())
    return (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0

"""What the page says of a bank as a whole: counts, score distributions, admission, concepts and duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from feature_bank.report.cards import Card, main_fidelity
from feature_bank.report.charts import AUROC, CORRELATION, Histogram, compare
from feature_bank.schema import FeatureRecord, HeadRecord
from feature_bank.taxonomy import DOMAINS, Domain

__all__ = [
    "Counts",
    "DuplicatePair",
    "Field",
    "Quality",
    "Rule",
    "admission",
    "counts",
    "detection_histograms",
    "duplicate_pairs",
    "failed_rules",
    "fidelity_histograms",
    "head_rates",
    "quality",
]


@dataclass(frozen=True, kw_only=True)
class Count:
    """A cell of the table of domains and layers."""

    total: int
    admitted: int
    bar: float
    """Of the fullest cell, 0 to 100."""
    admitted_bar: float


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Features by layer and domain; one with several domains counts in each, and once in its layer's total."""

    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Count, ...], Count], ...]
    totals: tuple[Count, ...]
    total: Count


def counts(features: Sequence[FeatureRecord]) -> Counts:
    """Count the features of every layer and domain. `untagged` is a column where some have no domain."""
    columns = (*DOMAINS, *(("untagged",) if any(not f.domains for f in features) else ()))
    layers = sorted({feature.layer for feature in features})

    def belongs(feature: FeatureRecord, column: str | None) -> bool:
        return column is None or (column in feature.domains if feature.domains else column == "untagged")

    def members(layer: int | None, column: str | None) -> list[FeatureRecord]:
        return [f for f in features if (layer is None or f.layer == layer) and belongs(f, column)]

    largest = max((len(members(layer, column)) for layer in layers for column in columns), default=0) or 1

    def cell(layer: int | None, column: str | None) -> Count:
        found = members(layer, column)
        admitted = sum(f.admitted for f in found)
        bars = [min(100.0, round(100 * number / largest, 1)) for number in (len(found), admitted)]
        return Count(total=len(found), admitted=admitted, bar=bars[0], admitted_bar=bars[1])

    return Counts(
        columns=columns,
        rows=tuple((layer, tuple(cell(layer, c) for c in columns), cell(layer, None)) for layer in layers),
        totals=tuple(cell(None, c) for c in columns),
        total=cell(None, None),
    )


def fidelity_histograms(features: Sequence[FeatureRecord]) -> tuple[Histogram, ...]:
    """CorrScores against those of other features' explanations, for each level and simulator, segments first."""
    kinds = {(s.level, s.simulator) for f in features for s in f.fidelity}
    found = []
    for level, simulator in sorted(kinds):
        scores = [s for f in features for s in f.fidelity if (s.level, s.simulator) == (level, simulator)]
        found.append(
            compare(
                f"CorrScore, {level} level",
                [s.corr for s in scores],
                [s.corr_null_mean for s in scores],
                axis=CORRELATION,
                above=sum(s.corr_low > s.corr_null for s in scores),
                ticks=(-0.25, 0, 0.25, 0.5, 0.75, 1),
                label=simulator,
            )
        )
    return tuple(found)


def detection_histograms(features: Sequence[FeatureRecord]) -> tuple[Histogram, ...]:
    """For each domain, its features' AUROCs against those with shuffled labels."""
    found = []
    for domain in DOMAINS:
        name = f"auroc_{domain}"
        own = [f.scores for f in features if domain in f.domains and name in f.scores]
        if own:
            found.append(
                compare(
                    domain,
                    [scores[name] for scores in own],
                    [scores[f"{name}_null"] for scores in own if f"{name}_null" in scores],
                    axis=AUROC,
                    above=sum(_detects(scores, domain) for scores in own),
                    ticks=(0.25, 0.5, 0.75, 1),
                )
            )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One of the four things that are known of a feature, over the whole bank."""

    name: str
    meaning: str
    measured: int
    holds: int
    fails: int


def admission(cards: Sequence[Card]) -> tuple[Field, ...]:
    """Fidelity, detection, causality and review, each on its own: nothing here is blended."""
    checks: tuple[tuple[str, str, Callable[[Card], bool | None]], ...] = (
        ("fidelity", "the CorrScore's interval lies above what other features' explanations reach", _faithful),
        ("detection", "the AUROC's interval for one of its domains lies above that of shuffled labels", _detecting),
        ("causality", "ablating it lowers the score of one of its domains, the whole interval below 0", _causal),
        ("review", "a person's last verdict accepts or relabels it", _accepted),
    )
    found = []
    for name, meaning, check in checks:
        answers = [answer for card in cards if (answer := check(card)) is not None]
        holds = sum(answers)
        found.append(Field(name=name, meaning=meaning, measured=len(answers), holds=holds, fails=len(answers) - holds))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of admission that features fail."""

    text: str
    fails: int
    alone: int
    """Of these, features that fail no other."""
    bar: float


def failed_rules(features: Sequence[FeatureRecord]) -> tuple[Rule, ...]:
    """The rules that keep features out, those that keep out most first. What follows a colon is detail of one case."""
    failures = [{refusal.partition(":")[0].strip() for refusal in f.refusals} for f in features]
    fails = Counter(rule for failed in failures for rule in failed)
    alone = Counter(rule for failed in failures if len(failed) == 1 for rule in failed)
    most = max(fails.values(), default=1)
    return tuple(
        Rule(text=text, fails=number, alone=alone[text], bar=round(100 * number / most, 1))
        for text, number in sorted(fails.items(), key=lambda item: (-item[1], item[0]))
    )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The manifest's figures: those that each domain has as a table, the others by name."""

    domains: tuple[Domain, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    others: tuple[tuple[str, float], ...]


def quality(figures: Mapping[str, float]) -> Quality:
    """Set figures named `..._<domain>` beside one another."""
    table: dict[str, dict[Domain, float]] = {}
    others = []
    for name, value in figures.items():
        domain = next((d for d in DOMAINS if name.endswith(f"_{d}")), None)
        if domain is None:
            others.append((name, value))
        else:
            table.setdefault(name.removesuffix(f"_{domain}"), {})[domain] = value
    domains = tuple(d for d in DOMAINS if any(d in row for row in table.values()))
    return Quality(
        domains=domains,
        rows=tuple((name, tuple(row.get(d) for d in domains)) for name, row in table.items()),
        others=tuple(others),
    )


def head_rates(heads: Iterable[HeadRecord]) -> list[str]:
    """The false-positive rates that the heads have thresholds for, as their keys, smallest first."""
    return sorted({rate for head in heads for rate in (*head.thresholds, *head.streaming_thresholds)}, key=float)


@dataclass(frozen=True, kw_only=True)
class DuplicatePair:
    """Two features that fire on nearly the same tokens."""

    first: FeatureRecord
    second: FeatureRecord
    correlation: float


def duplicate_pairs(features: Sequence[FeatureRecord]) -> tuple[DuplicatePair, ...]:
    """Every linked pair of features once, the closest first."""
    by_id = {feature.id: feature for feature in features}
    found: dict[tuple[str, str], DuplicatePair] = {}
    for feature in features:
        for link in feature.duplicates:
            other = by_id.get(link.id)
            if other is not None and (other.id, feature.id) not in found:
                found[feature.id, other.id] = DuplicatePair(first=feature, second=other, correlation=link.correlation)
    return tuple(sorted(found.values(), key=lambda pair: -pair.correlation))


def _detects(scores: Mapping[str, float], domain: str) -> bool:
    name = f"auroc_{domain}"
    return scores.get(f"{name}_low", scores[name]) > scores.get(f"{name}_null", 0.5)


def _faithful(card: Card) -> bool | None:
    score = main_fidelity(card.record)
    return None if score is None else score.corr_low > score.corr_null


def _detecting(card: Card) -> bool | None:
    scores = card.record.scores
    own = [domain for domain in card.record.domains if f"auroc_{domain}" in scores]
    return any(_detects(scores, domain) for domain in own) if own else None


def _causal(card: Card) -> bool | None:
    own = [effect for effect in card.effects if effect.own]
    return any(effect.high is not None and effect.high < 0 for effect in own) if own else None


def _accepted(card: Card) -> bool | None:
    return card.verdict == "accepted" if card.verdict else None

"""The policy's rules and allowances, resolved against a bank, as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank
from guard.errors import PolicyError
from guard.events import Phase
from guard.heads import DomainHeads
from guard.policy import Condition, Policy, Rule, Signal


def allowed_features(policy: Policy, bank: Bank) -> dict[str, list[int]]:
    """Of each domain, the places of the features that tell nothing of it but concepts which the policy allows.

    Raises PolicyError for a concept that no feature of the bank has, or that a rule is about.
    """
    for number, concept in enumerate(policy.allow):
        place = policy.place(f"field 'allow.{number}'", "allow", number)
        if not any(concept in feature.concepts for feature in bank.features):
            raise PolicyError(
                f"{place}: no feature of the bank has the concept {concept!r}; concepts are DOMAIN/CONCEPT, and "
                "`sailguard taxonomy list` names them"
            )
        rule = next((rule for rule in policy.rules if any(s.concept == concept for s in rule.signals)), None)
        if rule is not None:
            raise PolicyError(f"{place}: {concept!r} is allowed, but rule {rule.label!r} is about it; remove either")
    found: dict[str, list[int]] = {}
    for domain in dict.fromkeys(concept.rpartition("/")[0] for concept in policy.allow):
        own = [[c for c in feature.concepts if c.startswith(f"{domain}/")] for feature in bank.features]
        found[domain] = [i for i, concepts in enumerate(own) if concepts and set(concepts) <= set(policy.allow)]
    return found


class BoundSignal(NamedTuple):
    """A domain, concept or feature with its threshold, resolved against the bank."""

    domain: str
    """Empty for a feature that has none."""
    head: int | None
    """Column of the domain's head; None for features."""
    columns: npt.NDArray[np.int64]
    """The places in the bank of the features that it looks at, or that speak for the domain."""
    threshold: float
    """Probability or activation."""
    level: float
    """What is compared: the logit of that probability, or the activation."""


class BoundRule(NamedTuple):
    """A rule resolved against the bank. One with several signals compares 1 where its condition holds and else 0."""

    rule: Rule
    signals: tuple[BoundSignal, ...]
    domain: str
    """Of its (first) target; empty for a feature that has none."""
    head: int | None
    """Column of the domain's head, of a rule on a single domain."""
    columns: npt.NDArray[np.int64]
    """The features that it looks at, or that speak for its domains."""
    threshold: float
    level: float
    evidence_tokens: int
    settle_tokens: int
    """The first token of a streaming text, counted from 1, that counts."""

    @property
    def on_average(self) -> bool:
        """Whether it looks at a domain, which is judged by an average over tokens."""
        return any(signal.head is not None for signal in self.signals)


class RuleTable:
    """The rules of one scope (prompt or response), as aligned arrays."""

    def __init__(self, rules: tuple[BoundRule, ...], domains: int) -> None:
        self.rules = rules
        self.level = np.array([r.level for r in rules], dtype=np.float64)
        self.evidence_tokens = np.array([r.evidence_tokens for r in rules], dtype=np.int64)
        self.settle_tokens = np.array([r.settle_tokens for r in rules], dtype=np.int64)
        self.cooldown = np.array([r.rule.cooldown_tokens or np.iinfo(np.int64).max for r in rules], dtype=np.int64)
        """Tokens after which a rule is released; more than there ever are for one that is not."""
        self.cools = np.array([r.rule.cooldown_tokens is not None for r in rules], dtype=np.bool_)
        self.on_heads = np.array([i for i, r in enumerate(rules) if r.head is not None], dtype=np.int64)
        self.heads = np.array([r.head for r in rules if r.head is not None], dtype=np.int64)
        self.others = [i for i, r in enumerate(rules) if r.head is None]
        """Rules that look at features, or at several signals."""
        self.lowest = np.full(domains, np.inf)
        """(domains,): the lowest logit at which any rule of a domain counts."""
        np.minimum.at(self.lowest, self.heads, self.level[self.on_heads])

    def values(
        self, logits: npt.NDArray[np.float64], acts: Callable[[], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float64]:
        """(n, R) what each rule compares, of (n, D) logits and (n, F) clipped activations, which are asked for if
        needed."""
        found = np.empty((len(logits), len(self.rules)))
        found[:, self.on_heads] = logits[:, self.heads]
        if self.others:
            known = acts()
            for place in self.others:
                found[:, place] = _values(self.rules[place], logits, known)
        return found


def _values(
    bound: BoundRule, logits: npt.NDArray[np.float64], acts: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """(n,) what a rule on features, or on several signals, compares."""
    each = [
        logits[:, s.head] if s.head is not None else acts[:, s.columns].max(1).astype(np.float64) for s in bound.signals
    ]
    if bound.rule.when is None:
        return each[0]
    holds = iter([values >= signal.level for values, signal in zip(each, bound.signals, strict=True)])
    return _holds(bound.rule.when, holds).astype(np.float64)


def _holds(condition: Condition, signals: Iterator[npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """Where a condition holds, of where each of its signals does, in order."""
    if not condition.parts:
        return next(signals)
    parts = np.stack([_holds(part, signals) for part in condition.parts])
    return np.asarray(parts.all(0) if condition.all is not None else parts.any(0))


def bind_rules(policy: Policy, bank: Bank, heads: DomainHeads, scope: Phase, *, streaming: bool) -> RuleTable:
    """The policy's rules for `scope`, resolved for text that streams or lies there whole.

    Raises PolicyError for a domain the bank has no head for, a concept or feature that it does not hold, a threshold
    that it has not or that nothing can reach, or features that it cannot steer.
    """
    bound = [_bind(policy, rule, bank, heads, streaming) for rule in policy.rules if scope in rule.scope]
    return RuleTable(tuple(bound), len(heads.domains))


def _bind(policy: Policy, rule: Rule, bank: Bank, heads: DomainHeads, streaming: bool) -> BoundRule:
    signals = tuple(
        _bind_domain(policy, rule, signal, bank, heads, streaming)
        if signal.domain
        else _bind_features(policy, rule, signal, bank)
        for signal in rule.signals
    )
    if rule.action == "steer" and not _steerable(bank, signals):
        raise PolicyError(
            f"{policy.where(rule, 'action')}: the bank has no decoder rows for the features of "
            f"{rule.target!r}, so that they cannot be steered; flag or block"
        )
    first, single, on_average = signals[0], rule.when is None, any(s.head is not None for s in signals)
    return BoundRule(
        rule=rule,
        signals=signals,
        domain=first.domain,
        head=first.head if single else None,
        columns=np.unique(np.concatenate([s.columns for s in signals])),
        threshold=first.threshold if single else 1.0,
        level=first.level if single else 1.0,
        evidence_tokens=rule.evidence_tokens or (bank.pooling.evidence_tokens if on_average else 1),
        settle_tokens=bank.pooling.settle_tokens if on_average else 1,
    )


def _bind_domain(
    policy: Policy, rule: Rule, signal: Signal, bank: Bank, heads: DomainHeads, streaming: bool
) -> BoundSignal:
    assert signal.domain is not None
    assert signal.threshold is not None
    if signal.domain not in heads.domains:
        raise PolicyError(
            f"{policy.where(rule, 'domain')}: the bank has no head for {signal.domain!r}; "
            f"it has {', '.join(heads.domains)}"
        )
    head = bank.heads[signal.domain]
    try:
        probability = signal.threshold.resolve(head, streaming=streaming)
    except PolicyError as e:
        raise PolicyError(f"{policy.where(rule, 'threshold', 'fpr')}: {e}") from None
    clipped = min(max(probability, 1e-9), 1 - 1e-9)
    position = {feature.id: i for i, feature in enumerate(bank.features)}
    speaking = [position[f] for f, weight in zip(head.features, head.weights, strict=True) if weight > 0]
    return BoundSignal(
        domain=signal.domain,
        head=heads.domains.index(signal.domain),
        columns=np.array(speaking, dtype=np.int64),
        threshold=probability,
        level=math.log(clipped / (1 - clipped)),
    )


def _bind_features(policy: Policy, rule: Rule, signal: Signal, bank: Bank) -> BoundSignal:
    if signal.feature is not None:
        columns = [i for i, feature in enumerate(bank.features) if feature.id == signal.feature]
        missing = f"{policy.where(rule, 'feature')}: the bank has no feature {signal.feature!r}; `sailguard bank list`"
    else:
        columns = [i for i, feature in enumerate(bank.features) if signal.concept in feature.concepts]
        missing = f"{policy.where(rule, 'concept')}: no feature of the bank has the concept {signal.concept!r}; "
        missing += "`sailguard taxonomy list`"
    if not columns:
        raise PolicyError(f"{missing} names what there is")
    assert signal.threshold is not None
    least, ceiling = signal.threshold.activation, bank.pooling.ceiling
    assert least is not None
    if least > ceiling:
        raise PolicyError(
            f"{policy.where(rule, 'threshold', 'activation')}: no activation reaches {least:g}, for the bank cuts them "
            f"off at {ceiling:g} times a feature's 99.9th percentile"
        )
    tags = bank.features[columns[0]].domains
    domain = next(iter(tags), "") if signal.concept is None else signal.concept.rpartition("/")[0]
    return BoundSignal(
        domain=domain, head=None, columns=np.array(columns, dtype=np.int64), threshold=least, level=least
    )


def check_reachable(policy: Policy, tables: Iterable[RuleTable]) -> None:
    """Raise PolicyError for a rule that can nowhere come to act: wherever it stands, a block of its domain comes first.

    tables: of every scope that rules are bound for.
    """
    stands = [(bound, table.rules) for table in tables for bound in table.rules]
    for rule in policy.rules:
        first = [
            next((other for other in others if _comes_first(other, bound)), None)
            for bound, others in stands
            if bound.rule is rule
        ]
        if first and first[0] is not None and None not in first:
            raise PolicyError(
                f"{policy.where(rule)}: it can never act, for {first[0].rule.label!r} blocks at a lower threshold or "
                "after fewer tokens; give this rule the lower threshold, or remove it"
            )


def _comes_first(blocker: BoundRule, rule: BoundRule) -> bool:
    """Whether a blocking rule has ended the sequence before the other one could fire."""
    if blocker.rule.action != "block" or blocker.rule.target != rule.rule.target:
        return False
    lower, fewer = blocker.level <= rule.level, blocker.evidence_tokens <= rule.evidence_tokens
    return lower and fewer and (blocker.level, blocker.evidence_tokens) != (rule.level, rule.evidence_tokens)


def _steerable(bank: Bank, signals: Iterable[BoundSignal]) -> bool:
    """Whether any of the features to steer has a decoder row: of some published SAEs there are only encoders."""
    place = {feature.id: i for i, feature in enumerate(bank.features)}
    wanted: set[int] = set()
    for signal in signals:
        if signal.head is None:
            wanted.update(signal.columns.tolist())
        else:
            head = bank.heads[signal.domain]
            wanted.update(place[f] for f, delta in zip(head.features, head.steering, strict=True) if delta)
    rows = np.concatenate([bank.rows[hook.hook_name].W_dec.any(axis=1) for hook in bank.manifest.hook_points])
    return bool(rows[sorted(wanted)].any())

"""The bank's domain heads and the policy's rules as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Bank
from guard.errors import PolicyError
from guard.events import Phase
from guard.policy import Policy, Rule


class DomainHeads:
    """Linear heads with their calibration folded in: features (n, F) -> evidence (n, D); averaged, plus bias
    = logits.

    allowed: of a domain, the places of features that are not to raise its score; where one lowers it, it still does.
    """

    def __init__(self, bank: Bank, device: torch.device, allowed: Mapping[str, Sequence[int]] | None = None) -> None:
        self.domains = tuple(bank.heads)
        self.pooling = bank.pooling
        position = {feature.id: i for i, feature in enumerate(bank.features)}
        weight = torch.zeros(len(bank.features), len(self.domains))
        bias = torch.zeros(len(self.domains))
        for column, domain in enumerate(self.domains):
            head = bank.heads[domain]
            slope = head.calibration.slope
            for feature, value in zip(head.features, head.weights, strict=True):
                weight[position[feature], column] = slope * value
            places = list((allowed or {}).get(domain, ()))
            weight[places, column] = weight[places, column].clamp_max(0.0)
            bias[column] = slope * head.bias + head.calibration.intercept
        self.weight: Float[Tensor, "F D"] = weight.to(device)
        self.bias: Float[Tensor, " D"] = bias.to(device)
        self.offset: npt.NDArray[np.float32] = bias.numpy()
        """(D,): the bias again, on the host."""

    def evidence(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n D"]:
        """What each token adds to the moving average of each domain."""
        return feature_acts.clamp_max(self.pooling.ceiling) @ self.weight


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
        rule = next((rule for rule in policy.rules if rule.concept == concept), None)
        if rule is not None:
            raise PolicyError(f"{place}: {concept!r} is allowed, but rule {rule.label!r} is about it; remove either")
    found: dict[str, list[int]] = {}
    for domain in dict.fromkeys(concept.rpartition("/")[0] for concept in policy.allow):
        own = [[c for c in feature.concepts if c.startswith(f"{domain}/")] for feature in bank.features]
        found[domain] = [i for i, concepts in enumerate(own) if concepts and set(concepts) <= set(policy.allow)]
    return found


class BoundRule(NamedTuple):
    """A rule with its target and threshold resolved against the bank."""

    rule: Rule
    domain: str
    """The domain of its target; empty for a feature that has none."""
    head: int | None
    """Column of the domain's head; None if the rule looks at features themselves."""
    columns: npt.NDArray[np.int64]
    """Those features' places in the bank; empty if there is a head."""
    threshold: float
    """Probability or activation."""
    level: float
    """What is compared: the logit of that probability, or the activation."""
    evidence_tokens: int
    settle_tokens: int
    """The first token of a streaming text, counted from 1, that counts."""


class RuleTable:
    """The rules of one scope (prompt or response), as aligned arrays."""

    def __init__(self, rules: tuple[BoundRule, ...], domains: int) -> None:
        self.rules = rules
        self.level = np.array([r.level for r in rules], dtype=np.float64)
        self.evidence_tokens = np.array([r.evidence_tokens for r in rules], dtype=np.int64)
        self.settle_tokens = np.array([r.settle_tokens for r in rules], dtype=np.int64)
        self.on_heads = np.array([i for i, r in enumerate(rules) if r.head is not None], dtype=np.int64)
        self.heads = np.array([r.head for r in rules if r.head is not None], dtype=np.int64)
        self.on_features = [i for i, r in enumerate(rules) if r.head is None]
        self.lowest = np.full(domains, np.inf)
        """(domains,): the lowest logit at which any rule of a domain counts."""
        np.minimum.at(self.lowest, self.heads, self.level[self.on_heads])

    def values(
        self, logits: npt.NDArray[np.float64], acts: Callable[[], Float[Tensor, "n F"]]
    ) -> npt.NDArray[np.float64]:
        """(n, R) what each rule compares, of (n, D) logits and clipped activations, which are asked for if needed."""
        found = np.empty((len(logits), len(self.rules)))
        found[:, self.on_heads] = logits[:, self.heads]
        if self.on_features:
            known = acts()
            for place in self.on_features:
                found[:, place] = known[:, self.rules[place].columns].amax(1).cpu().numpy()
        return found


def bind_rules(policy: Policy, bank: Bank, heads: DomainHeads, scope: Phase, *, streaming: bool) -> RuleTable:
    """The policy's rules for `scope`, resolved for text that streams or lies there whole.

    Raises PolicyError for a domain the bank has no head for, a concept or feature that it does not hold, a threshold
    that it has not or that nothing can reach, or features that it cannot steer.
    """
    bound = []
    for rule in policy.rules:
        if scope not in rule.scope:
            continue
        found = (
            _bind_domain(policy, rule, bank, heads, streaming) if rule.domain else _bind_features(policy, rule, bank)
        )
        if rule.action == "steer" and not _steerable(bank, _targets(found, bank)):
            raise PolicyError(
                f"{policy.where(rule, 'action')}: the bank has no decoder rows for the features of "
                f"{rule.target!r}, so that they cannot be steered; flag or block"
            )
        bound.append(found)
    return RuleTable(tuple(bound), len(heads.domains))


def _bind_domain(policy: Policy, rule: Rule, bank: Bank, heads: DomainHeads, streaming: bool) -> BoundRule:
    assert rule.domain is not None
    if rule.domain not in heads.domains:
        raise PolicyError(
            f"{policy.where(rule, 'domain')}: the bank has no head for {rule.domain!r}; "
            f"it has {', '.join(heads.domains)}"
        )
    try:
        probability = rule.threshold.resolve(bank.heads[rule.domain], streaming=streaming)
    except PolicyError as e:
        raise PolicyError(f"{policy.where(rule, 'threshold', 'fpr')}: {e}") from None
    clipped = min(max(probability, 1e-9), 1 - 1e-9)
    return BoundRule(
        rule=rule,
        domain=rule.domain,
        head=heads.domains.index(rule.domain),
        columns=np.zeros(0, dtype=np.int64),
        threshold=probability,
        level=math.log(clipped / (1 - clipped)),
        evidence_tokens=rule.evidence_tokens or bank.pooling.evidence_tokens,
        settle_tokens=bank.pooling.settle_tokens,
    )


def _bind_features(policy: Policy, rule: Rule, bank: Bank) -> BoundRule:
    if rule.feature is not None:
        columns = [i for i, feature in enumerate(bank.features) if feature.id == rule.feature]
        missing = f"{policy.where(rule, 'feature')}: the bank has no feature {rule.feature!r}; `sailguard bank list`"
    else:
        columns = [i for i, feature in enumerate(bank.features) if rule.concept in feature.concepts]
        missing = f"{policy.where(rule, 'concept')}: no feature of the bank has the concept {rule.concept!r}; "
        missing += f"`sailguard bank list --concept {rule.concept}`"
    if not columns:
        raise PolicyError(f"{missing} names what there is")
    least, ceiling = rule.threshold.activation, bank.pooling.ceiling
    assert least is not None
    if least > ceiling:
        raise PolicyError(
            f"{policy.where(rule, 'threshold', 'activation')}: no activation reaches {least:g}, for the bank cuts them "
            f"off at {ceiling:g} times a feature's 99.9th percentile"
        )
    first = bank.features[columns[0]]
    domain = first.domains[0] if rule.concept is None and first.domains else (rule.concept or "").rpartition("/")[0]
    return BoundRule(
        rule=rule,
        domain=domain,
        head=None,
        columns=np.array(columns, dtype=np.int64),
        threshold=least,
        level=least,
        evidence_tokens=rule.evidence_tokens or 1,
        settle_tokens=1,
    )


def _targets(bound: BoundRule, bank: Bank) -> set[str]:
    """The ids of the features that steering by a rule changes."""
    if bound.head is not None:
        return set(bank.heads[bound.domain].features)
    return {bank.features[i].id for i in bound.columns}


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


def _steerable(bank: Bank, wanted: set[str]) -> bool:
    """Whether any of the features has a decoder row: of some published SAEs there are only encoders."""
    start = 0
    for hook in bank.manifest.hook_points:
        rows = bank.rows[hook.hook_name].W_dec
        here = bank.features[start : start + hook.n_selected]
        start += hook.n_selected
        if rows[[feature.id in wanted for feature in here]].any():
            return True
    return False

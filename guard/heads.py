"""The bank's domain heads and the policy's rules as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    = logits."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
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
            bias[column] = slope * head.bias + head.calibration.intercept
        self.weight: Float[Tensor, "F D"] = weight.to(device)
        self.bias: Float[Tensor, " D"] = bias.to(device)
        self.offset: npt.NDArray[np.float32] = bias.numpy()
        """(D,): the bias again, on the host."""

    def evidence(self, feature_acts: Float[Tensor, "n F"]) -> Float[Tensor, "n D"]:
        """What each token adds to the moving average of each domain."""
        return feature_acts.clamp_max(self.pooling.ceiling) @ self.weight


class BoundRule(NamedTuple):
    """A rule with its threshold resolved against the bank."""

    rule: Rule
    domain: int
    threshold: float  # probability
    logit: float
    evidence_tokens: int


class RuleTable:
    """The rules of one scope (prompt or response), as aligned arrays."""

    def __init__(self, rules: tuple[BoundRule, ...], domains: int) -> None:
        self.rules = rules
        self.domain = np.array([r.domain for r in rules], dtype=np.int64)
        self.logit = np.array([r.logit for r in rules], dtype=np.float64)
        self.evidence_tokens = np.array([r.evidence_tokens for r in rules], dtype=np.int64)
        self.lowest = np.full(domains, np.inf)
        """(domains,): the lowest logit at which any rule of a domain counts."""
        np.minimum.at(self.lowest, self.domain, self.logit)


def bind_rules(policy: Policy, bank: Bank, heads: DomainHeads, scope: Phase, *, streaming: bool) -> RuleTable:
    """The policy's rules for `scope`, resolved for text that streams or lies there whole.

    Raises PolicyError for a domain the bank has no head for, or whose features it cannot steer.
    """
    bound = []
    for rule in policy.rules:
        if scope not in rule.scope:
            continue
        if rule.domain not in heads.domains:
            raise PolicyError(
                f"{policy.where(rule, 'domain')}: the bank has no head for {rule.domain!r}; "
                f"it has {', '.join(heads.domains)}"
            )
        if rule.action == "steer" and not _steerable(bank, rule.domain):
            raise PolicyError(
                f"{policy.where(rule, 'action')}: the bank has no decoder rows for the features of "
                f"{rule.domain!r}, so that they cannot be steered; flag or block"
            )
        try:
            probability = rule.threshold.resolve(bank.heads[rule.domain], streaming=streaming)
        except PolicyError as e:
            raise PolicyError(f"{policy.where(rule, 'threshold', 'fpr')}: {e}") from None
        clipped = min(max(probability, 1e-9), 1 - 1e-9)
        bound.append(
            BoundRule(
                rule=rule,
                domain=heads.domains.index(rule.domain),
                threshold=probability,
                logit=math.log(clipped / (1 - clipped)),
                evidence_tokens=rule.evidence_tokens or bank.pooling.evidence_tokens,
            )
        )
    return RuleTable(tuple(bound), len(heads.domains))


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
    if blocker.rule.action != "block" or blocker.domain != rule.domain:
        return False
    lower, fewer = blocker.logit <= rule.logit, blocker.evidence_tokens <= rule.evidence_tokens
    return lower and fewer and (blocker.logit, blocker.evidence_tokens) != (rule.logit, rule.evidence_tokens)


def _steerable(bank: Bank, domain: str) -> bool:
    """Whether any feature of the domain's head has a decoder row: of some published SAEs there are only encoders."""
    wanted = set(bank.heads[domain].features)
    start = 0
    for hook in bank.manifest.hook_points:
        rows = bank.rows[hook.hook_name].W_dec
        here = bank.features[start : start + hook.n_selected]
        start += hook.n_selected
        if rows[[feature.id in wanted for feature in here]].any():
            return True
    return False

"""From feature activations to verdicts on text that lies there whole. It knows no engine, and needs NumPy alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank
from feature_bank.heads import agreement, moving_average
from guard.errors import GuardError
from guard.events import FeatureHit, Phase, Verdict
from guard.heads import DomainHeads
from guard.policy import Policy
from guard.rules import BoundRule, allowed_features, bind_rules, check_reachable

TOP_FEATURES = 5
NOT_FINITE = "the activations are NaN: the model's weights or its dtype are broken, and nothing can be judged"
Floats = npt.NDArray[np.float32]


class OnDevice(Protocol):
    """What of a tensor is used here."""

    def cpu(self) -> OnDevice:
        """The same on the host."""

    def numpy(self) -> npt.NDArray[Any]:
        """The same as an array."""


def on_host(values: npt.NDArray[Any] | OnDevice) -> npt.NDArray[Any]:
    """An array as it is, a tensor from wherever it lies. A judge takes either."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


class Judged(NamedTuple):
    """Every token of some text, judged."""

    logits: Floats
    """(n, D): the calibrated logit of the moving average at each observed token."""
    agreed: Floats
    """(n, D): the logit on which enough tokens agree once the average has settled; -inf where too few have been
    seen."""


class Judge:
    """Judges texts with a bank under a policy. Holds no state of any text; threads may share it.

    Activations (n, F) are those of a text's observed tokens in the bank's order, segments (n,) their segments'
    numbers: arrays, or tensors on any device, which come to the host once.

    Raises PolicyError for a policy that asks for what the bank does not hold.
    """

    def __init__(self, bank: Bank, policy: Policy) -> None:
        self.bank = bank
        self.policy = policy
        self.allowed = allowed_features(policy, bank)
        self.heads = DomainHeads(bank, self.allowed)
        self.streaming_heads = DomainHeads(bank, self.allowed, streaming=True)
        phases: tuple[Phase, ...] = ("prompt", "response")
        self.rules = {p: bind_rules(policy, bank, self.heads, p, streaming=False) for p in phases}
        self.streaming_rules = bind_rules(policy, bank, self.streaming_heads, "response", streaming=True)
        check_reachable(policy, [*self.rules.values(), self.streaming_rules])

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the bank has a head for, in the order of every D axis."""
        return self.heads.domains

    def judge(self, feature_acts: npt.NDArray[Any] | OnDevice, segment: npt.NDArray[Any] | OnDevice) -> Judged:
        """Logits of all tokens of segmented text.

        Raises GuardError if the activations are not numbers.
        """
        segments, pooling = on_host(segment), self.bank.pooling
        average = moving_average(self.heads.evidence(on_host(feature_acts)), segments, pooling)
        logits = average + self.heads.bias
        if np.isnan(logits).any():
            raise GuardError(NOT_FINITE)
        return Judged(logits, agreement(logits, segments, pooling.evidence_tokens, settled=pooling.window))

    def apply_rules(
        self,
        phase: Phase,
        request_id: str,
        judged: Judged,
        feature_acts: npt.NDArray[Any] | OnDevice,
        segment: npt.NDArray[Any] | OnDevice,
        positions: npt.NDArray[Any] | OnDevice,
    ) -> list[Verdict]:
        """The rules for `phase` that fire, each at its first deciding token. positions: (n,) each token's number."""
        acts, segments, places = on_host(feature_acts), on_host(segment), on_host(positions)
        verdicts = []
        table, pooling = self.rules[phase], self.bank.pooling
        values = table.values(judged.logits.astype(np.float64), lambda: self.heads.clip(acts))
        for rule, bound in enumerate(table.rules):
            if bound.head is not None and bound.evidence_tokens == pooling.evidence_tokens:
                agreed: npt.NDArray[Any] = judged.agreed[:, bound.head]
            else:
                settled = pooling.window if bound.on_average else 1
                agreed = agreement(values[:, rule, None], segments, bound.evidence_tokens, settled=settled)[:, 0]
            hits = np.flatnonzero(agreed >= bound.level)
            if not len(hits):
                continue
            at = int(hits[0])
            shown = acts[at] if bound.head is None else self.window_average(acts, segments, at)
            verdicts.append(self.verdict(bound, phase, request_id, int(places[at]), float(values[at, rule]), shown))
        return verdicts

    def window_average(
        self, feature_acts: npt.NDArray[Any] | OnDevice, segment: npt.NDArray[Any] | OnDevice, at: int
    ) -> Floats:
        """(F,) the moving average of every feature's clipped activation at one token."""
        acts, segments, pooling = on_host(feature_acts), on_host(segment), self.bank.pooling
        first = max(0, at - pooling.window + 1)
        same = segments[first : at + 1] == segments[at]
        average: Floats = self.heads.clip(acts[first : at + 1][same]).sum(0) / max(int(same.sum()), pooling.min_tokens)
        return average

    def hits(
        self, average: npt.NDArray[Any] | OnDevice, domain: int, top: int = TOP_FEATURES, *, streaming: bool = False
    ) -> tuple[FeatureHit, ...]:
        """The features that add most to a domain's logit, given their (average) clipped activations (F,)."""
        heads, acts = self.streaming_heads if streaming else self.heads, on_host(average)
        contribution = acts * heads.weight[:, domain]
        order = np.argsort(-contribution, kind="stable")[:top].tolist()
        return tuple(self.hit(i, acts, contribution) for i in order if contribution[i] > 0)

    def hit(self, feature: int, acts: Floats, contribution: Floats) -> FeatureHit:
        """What is told of one feature, given the activations (F,) and contributions (F,) of all."""
        record = self.bank.features[feature]
        return FeatureHit(
            id=record.id,
            layer=record.layer,
            explanation=record.explanation,
            activation=round(float(acts[feature]), 6),
            contribution=round(float(contribution[feature]), 6),
        )

    def verdict(
        self,
        bound: BoundRule,
        phase: Phase,
        request_id: str,
        token: int,
        value: float,
        acts: Floats,
        *,
        streaming: bool = False,
    ) -> Verdict:
        """value: what the rule compared; acts: the features' activations (F,) that explain it."""
        return Verdict(
            request_id=request_id,
            phase=phase,
            token_index=token,
            domain=bound.domain,
            score=value if bound.head is None else sigmoid(value),
            threshold=bound.threshold,
            action=bound.rule.action,
            rule=bound.rule.label,
            features=self._hits_of(bound, acts)
            if bound.head is None
            else self.hits(acts, bound.head, streaming=streaming),
            bank_version=self.bank.version,
            policy_version=self.policy.version,
        )

    def _hits_of(self, bound: BoundRule, acts: Floats) -> tuple[FeatureHit, ...]:
        """The most active of the features that a rule looks at."""
        weight = np.zeros_like(acts)
        if bound.domain in self.domains:
            weight = self.heads.weight[:, self.domains.index(bound.domain)]
        order = sorted(bound.columns.tolist(), key=lambda i: -float(acts[i]))[:TOP_FEATURES]
        return tuple(self.hit(i, acts, acts * weight) for i in order if acts[i] > 0)


def sigmoid(logit: float) -> float:
    """Probability of a logit; 0.0 for -inf."""
    if logit == -math.inf:
        return 0.0
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))

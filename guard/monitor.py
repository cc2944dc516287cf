"""The engine-neutral core: from feature activations of known sequences to verdicts. It knows nothing of any engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from feature_bank.bank import Bank
from feature_bank.heads import agreement, moving_average
from guard.encoder import SelectedEncoder
from guard.errors import GuardError
from guard.events import FeatureHit, Phase, Verdict
from guard.heads import BoundRule, DomainHeads, RuleTable, bind_rules
from guard.policy import Policy
from guard.state import BatchState

TOP_FEATURES = 5
_NOT_FINITE = "the activations are NaN: the model's weights or its dtype are broken, and nothing can be judged"


class Judged(NamedTuple):
    """Every token of some text, judged."""

    logits: Float[Tensor, "n D"]
    """The calibrated logit of the moving average at each observed token."""
    agreed: Float[Tensor, "n D"]
    """The logit on which enough tokens agree; -inf where too few have been seen."""


class Monitor:
    """Judges sequences with a bank under a policy. Holds no state of any sequence: that is in `BatchState`."""

    def __init__(self, bank: Bank, policy: Policy, device: torch.device) -> None:
        self.bank = bank
        self.policy = policy
        self.device = device
        self.encoder = SelectedEncoder(bank, device)
        self.heads = DomainHeads(bank, device)
        self.prompt_rules = bind_rules(policy, bank, self.heads, "prompt", device)
        self.response_rules = bind_rules(policy, bank, self.heads, "response", device)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the bank has a head for, in the order of every D axis."""
        return self.heads.domains

    def begin(self, request_ids: Sequence[str]) -> BatchState:
        """Fresh state for a batch of sequences."""
        return BatchState.create(
            tuple(request_ids),
            window=self.bank.pooling.window,
            domains=len(self.domains),
            features=self.encoder.n_features,
            rules=len(self.response_rules.rules),
            evidence_tokens=self.bank.pooling.evidence_tokens,
            device=self.device,
        )

    def judge(self, feature_acts: Float[Tensor, "n F"], segment: Int[Tensor, " n"]) -> Judged:
        """Logits of all tokens of segmented text at once.

        Raises GuardError if the activations are not numbers.
        """
        average = moving_average(self.heads.evidence(feature_acts), segment, self.bank.pooling)
        logits = average + self.heads.bias
        if bool(logits.isnan().any()):
            raise GuardError(_NOT_FINITE)
        return Judged(logits, agreement(logits, segment, self.bank.pooling.evidence_tokens))

    def observe_prompt(
        self,
        state: BatchState,
        row: int,
        feature_acts: Float[Tensor, "n F"],
        segment: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
    ) -> list[Verdict]:
        """Judge the whole prompt of sequence `row`: its observed tokens, their segments, their positions in it."""
        if feature_acts.shape[0] == 0:
            return []
        judged = self.judge(feature_acts, segment)
        state.best_prompt[row] = judged.agreed.max(0).values
        verdicts = self.apply_rules(
            self.prompt_rules, "prompt", state.request_ids[row], judged, feature_acts, segment, positions
        )
        self._record(state, row, verdicts)
        return verdicts

    def apply_rules(
        self,
        table: RuleTable,
        phase: Phase,
        request_id: str,
        judged: Judged,
        feature_acts: Float[Tensor, "n F"],
        segment: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
    ) -> list[Verdict]:
        """The rules that fire on text that has been judged as a whole, each at its first deciding token."""
        verdicts = []
        for bound in table.rules:
            agreed = judged.agreed[:, bound.domain]
            if bound.evidence_tokens != self.bank.pooling.evidence_tokens:
                agreed = agreement(judged.logits[:, bound.domain, None], segment, bound.evidence_tokens)[:, 0]
            hits = torch.nonzero(agreed >= bound.logit)
            if hits.numel() == 0:
                continue
            at = int(hits[0, 0])
            average = self.window_average(feature_acts, segment, at)
            logit = float(judged.logits[at, bound.domain])
            verdicts.append(self._verdict(bound, phase, request_id, int(positions[at]), logit, average))
        return verdicts

    def window_average(
        self, feature_acts: Float[Tensor, "n F"], segment: Int[Tensor, " n"], at: int
    ) -> Float[Tensor, " F"]:
        """The moving average of every feature's clipped activation at one token."""
        first = max(0, at - self.bank.pooling.window + 1)
        same = (segment[first : at + 1] == segment[at])[:, None]
        clipped = feature_acts[first : at + 1].clamp_max(self.bank.pooling.ceiling) * same
        return clipped.sum(0) / max(int(same.sum()), self.bank.pooling.min_tokens)

    def observe_step(
        self,
        state: BatchState,
        feature_acts: Float[Tensor, "B F"],
        live: Bool[Tensor, " B"] | None = None,
    ) -> list[tuple[int, Verdict]]:
        """Judge one response token of every sequence (of those in `live`, if given). Returns (row, verdict) pairs."""
        clipped = feature_acts.clamp_max(self.bank.pooling.ceiling)
        table = self.response_rules
        if live is None and state.steps is not None:
            rows = state.index
            logits = self._advance_all(state, clipped)
            runs = state.runs.add_(1).mul_(logits[:, table.domain] >= table.logit)
            fired = (runs >= table.evidence_tokens) & ~state.latched
        else:
            state.steps = None  # from here on the rows have counts of their own
            rows = state.index if live is None else state.index[live]
            logits = self._advance(state, rows, clipped if live is None else clipped[live])
            runs = (state.runs[rows] + 1) * (logits[:, table.domain] >= table.logit)
            state.runs[rows] = runs
            fired = (runs >= table.evidence_tokens) & ~state.latched[rows]
        broken = logits.isnan().any()
        if not bool(fired.any() | broken):  # one wait for the device in the common case
            return []
        if bool(broken):
            raise GuardError(_NOT_FINITE)
        state.latched[rows] |= fired
        verdicts = []
        for position, rule in fired.nonzero().tolist():
            row = int(rows[position])
            verdicts.append(
                (
                    row,
                    self._response_verdict(state, row, rule, float(logits[position, table.rules[rule].domain])),
                )
            )
        for row, verdict in verdicts:
            self._record(state, row, [verdict])
        return verdicts

    def _advance_all(self, state: BatchState, clipped: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """The logits after one more token of every sequence, all having seen the same number of tokens.

        The same as `_advance`, for the common case: slices of the rings instead of gathers, half the time of a step.
        """
        pooling = self.bank.pooling
        assert state.steps is not None
        slot = state.steps % pooling.window
        state.ring[:, slot] = clipped @ self.heads.weight
        state.feature_ring[:, slot] = clipped
        state.count.add_(1)
        state.steps += 1
        divisor = max(min(state.steps, pooling.window), pooling.min_tokens)
        logits = state.ring.sum(1).div_(divisor).add_(self.heads.bias)
        state.recent[:, (state.steps - 1) % pooling.evidence_tokens] = logits
        torch.maximum(state.best_response, state.recent.amin(1), out=state.best_response)
        return logits

    def _advance(
        self, state: BatchState, rows: Int[Tensor, " b"], clipped: Float[Tensor, "b F"]
    ) -> Float[Tensor, "b D"]:
        """The logits after one more token of the sequences `rows`."""
        pooling = self.bank.pooling
        slot = state.count[rows] % pooling.window
        state.ring[rows, slot] = clipped @ self.heads.weight
        state.feature_ring[rows, slot] = clipped
        state.count[rows] += 1
        count = state.count[rows]
        divisor = count.clamp(pooling.min_tokens, max(pooling.window, pooling.min_tokens))
        logits = state.ring[rows].sum(1) / divisor[:, None] + self.heads.bias
        state.recent[rows, (count - 1) % pooling.evidence_tokens] = logits
        state.best_response[rows] = torch.maximum(state.best_response[rows], state.recent[rows].amin(1))
        return logits

    def finish(self, state: BatchState) -> list[tuple[int, Verdict]]:
        """At the end of the responses: rules that all tokens met, of a response shorter than their evidence."""
        table = self.response_rules
        count = state.count[:, None]
        short = (count > 0) & (count < table.evidence_tokens) & (state.runs == count) & ~state.latched
        few = (state.count > 0) & (state.count < self.bank.pooling.evidence_tokens)
        for row in few.nonzero().flatten().tolist():
            state.best_response[row] = state.recent[row, : int(state.count[row])].amin(0)
        verdicts = []
        for row, rule in short.nonzero().tolist():
            last = (int(state.count[row]) - 1) % self.bank.pooling.evidence_tokens
            logit = float(state.recent[row, last, table.rules[rule].domain])
            verdicts.append((row, self._response_verdict(state, row, rule, logit)))
            state.latched[row, rule] = True
            self._record(state, row, [verdicts[-1][1]])
        return verdicts

    def hits(self, average: Float[Tensor, " F"], domain: int, top: int = TOP_FEATURES) -> tuple[FeatureHit, ...]:
        """The features that add most to a domain's logit, given their (average) clipped activations."""
        contribution = average * self.heads.weight[:, domain]
        order = contribution.argsort(descending=True)[:top].tolist()
        return tuple(
            FeatureHit(
                id=self.bank.features[i].id,
                layer=self.bank.features[i].layer,
                explanation=self.bank.features[i].explanation,
                activation=round(float(average[i]), 6),
                contribution=round(float(contribution[i]), 6),
            )
            for i in order
            if float(contribution[i]) > 0
        )

    @property
    def hold_tokens(self) -> int:
        """Response tokens to judge before the first text may be shown, if a response that ends early is to be
        blocked before any of it is seen: the evidence that the slowest blocking rule asks for."""
        blocking = (r.evidence_tokens for r in self.response_rules.rules if r.rule.action == "block")
        return max(blocking, default=0)

    def _response_verdict(self, state: BatchState, row: int, rule: int, logit: float) -> Verdict:
        average = state.feature_ring[row].sum(0) / max(
            min(int(state.count[row]), self.bank.pooling.window), self.bank.pooling.min_tokens
        )
        token = int(state.count[row]) - 1
        return self._verdict(self.response_rules.rules[rule], "response", state.request_ids[row], token, logit, average)

    def _verdict(
        self,
        bound: BoundRule,
        phase: Phase,
        request_id: str,
        token: int,
        logit: float,
        average: Float[Tensor, " F"],
    ) -> Verdict:
        return Verdict(
            request_id=request_id,
            phase=phase,
            token_index=token,
            domain=bound.rule.domain,
            score=sigmoid(logit),
            threshold=bound.threshold,
            action=bound.rule.action,
            rule=bound.rule.label,
            features=self.hits(average, bound.domain),
            bank_version=self.bank.version,
            policy_version=self.policy.version,
        )

    @staticmethod
    def _record(state: BatchState, row: int, verdicts: list[Verdict]) -> None:
        state.verdicts[row].extend(verdicts)
        if any(v.action == "block" for v in verdicts):
            state.blocked[row] = True


def sigmoid(logit: float) -> float:
    """Probability of a logit; 0.0 for -inf."""
    if logit == -math.inf:
        return 0.0
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))

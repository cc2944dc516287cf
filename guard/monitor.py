"""The engine-neutral core: from feature activations of known sequences to verdicts. It knows nothing of any engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from feature_bank.bank import Bank
from feature_bank.heads import agreement, moving_average
from guard.encoder import SelectedEncoder
from guard.errors import GuardError
from guard.events import FeatureHit, Phase, Verdict
from guard.heads import DomainHeads
from guard.native import MAX_BATCH, CompiledStep, HookRows, is_half, library
from guard.policy import Policy
from guard.rules import BoundRule, allowed_features, bind_rules, check_reachable
from guard.state import BatchState

TOP_FEATURES = 5
_NOT_FINITE = "the activations are NaN: the model's weights or its dtype are broken, and nothing can be judged"


class Judged(NamedTuple):
    """Every token of some text, judged."""

    logits: Float[Tensor, "n D"]
    """The calibrated logit of the moving average at each observed token."""
    agreed: Float[Tensor, "n D"]
    """The logit on which enough tokens agree once the average has settled; -inf where too few have been seen."""


class Monitor:
    """Judges sequences with a bank under a policy. Holds no state of any sequence: that is in `BatchState`."""

    def __init__(self, bank: Bank, policy: Policy, device: torch.device) -> None:
        self.bank = bank
        self.policy = policy
        self.device = device
        self.encoder = SelectedEncoder(bank, device)
        self.allowed = allowed_features(policy, bank)
        self.heads = DomainHeads(bank, device, self.allowed)
        self.streaming_heads = DomainHeads(bank, device, self.allowed, streaming=True)
        phases: tuple[Phase, ...] = ("prompt", "response")
        self.rules = {p: bind_rules(policy, bank, self.heads, p, streaming=False) for p in phases}
        self.streaming_rules = bind_rules(policy, bank, self.streaming_heads, "response", streaming=True)
        check_reachable(policy, [*self.rules.values(), self.streaming_rules])
        self._compiled = self._compile() if device.type == "cpu" else None

    def _compile(self) -> CompiledStep | None:
        """The compiled step, where there is one and the bank's rows are no finer than it reads them."""
        rows = self.bank.rows
        if library() is None or not all(is_half(part.W_enc) for part in rows.values()):
            return None
        hooks = [
            HookRows(rows[name].W_enc, rows[name].b_enc, rows[name].threshold, self.encoder.scale[columns].numpy())
            for name, columns in self.encoder.columns.items()
        ]
        return CompiledStep(
            hooks,
            self.streaming_heads.weight.numpy(),
            self.streaming_heads.offset,
            self.streaming_rules.lowest,
            pooling=self.streaming_heads.pooling,
        )

    @property
    def compiled(self) -> bool:
        """Whether decoding steps of small batches are one compiled call."""
        return self._compiled is not None

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the bank has a head for, in the order of every D axis."""
        return self.heads.domains

    def begin(self, request_ids: Sequence[str]) -> BatchState:
        """Fresh state for a batch of sequences."""
        return BatchState.create(
            request_ids,
            window=self.streaming_heads.pooling.window,
            features=self.encoder.n_features,
            domains=len(self.domains),
            rules=len(self.streaming_rules.rules),
            device=self.device,
        )

    def judge(self, feature_acts: Float[Tensor, "n F"], segment: Int[Tensor, " n"]) -> Judged:
        """Logits of all tokens of segmented text that lies there whole.

        Raises GuardError if the activations are not numbers.
        """
        average = moving_average(self.heads.evidence(feature_acts), segment, self.bank.pooling)
        logits = average + self.heads.bias
        if bool(logits.isnan().any()):
            raise GuardError(_NOT_FINITE)
        return Judged(logits, self._agreed(logits, segment, self.bank.pooling.evidence_tokens))

    def _agreed(self, logits: Float[Tensor, "n d"], segment: Int[Tensor, " n"], tokens: int) -> Float[Tensor, "n d"]:
        return agreement(logits, segment, tokens, settled=self.bank.pooling.window)

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
        state.best_prompt[row] = judged.agreed.amax(0).cpu().numpy()
        verdicts = self.apply_rules("prompt", state.request_ids[row], judged, feature_acts, segment, positions)
        self._record(state, row, verdicts)
        table, fired = self.streaming_rules, {verdict.rule for verdict in verdicts}
        state.prompted[row] = [bound.rule.label in fired for bound in table.rules]
        state.counting = state.counting or bool((state.prompted & table.cools).any())
        return verdicts

    def apply_rules(
        self,
        phase: Phase,
        request_id: str,
        judged: Judged,
        feature_acts: Float[Tensor, "n F"],
        segment: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
    ) -> list[Verdict]:
        """The rules for `phase` that fire on text that lies there whole, each at its first deciding token."""
        verdicts = []
        table, pooling = self.rules[phase], self.bank.pooling
        values = table.values(judged.logits.double().cpu().numpy(), lambda: feature_acts.clamp_max(pooling.ceiling))
        for rule, bound in enumerate(table.rules):
            if bound.head is not None and bound.evidence_tokens == pooling.evidence_tokens:
                agreed = judged.agreed[:, bound.head].cpu().numpy()
            else:
                settled = pooling.window if bound.on_average else 1
                column = torch.from_numpy(values[:, rule, None]).to(segment.device)
                agreed = agreement(column, segment, bound.evidence_tokens, settled=settled)[:, 0].cpu().numpy()
            hits = np.flatnonzero(agreed >= bound.level)
            if not len(hits):
                continue
            at = int(hits[0])
            acts = feature_acts[at] if bound.head is None else self.window_average(feature_acts, segment, at)
            verdicts.append(self._verdict(bound, phase, request_id, int(positions[at]), float(values[at, rule]), acts))
        return verdicts

    def window_average(
        self, feature_acts: Float[Tensor, "n F"], segment: Int[Tensor, " n"], at: int
    ) -> Float[Tensor, " F"]:
        """The moving average of every feature's clipped activation at one token."""
        first = max(0, at - self.bank.pooling.window + 1)
        same = (segment[first : at + 1] == segment[at])[:, None]
        clipped = feature_acts[first : at + 1].clamp_max(self.bank.pooling.ceiling) * same
        return clipped.sum(0) / max(int(same.sum()), self.bank.pooling.min_tokens)

    def observe_hidden(
        self,
        state: BatchState,
        sae_ins: Mapping[str, Float[Tensor, "B 1 d_in"]],
        live: npt.NDArray[np.bool_] | None = None,
    ) -> list[tuple[int, Verdict]]:
        """Judge one response token of every sequence (of those in `live`, if given) by the activations at the hook
        points. Returns (row, verdict) pairs.

        Raises GuardError if the activations are not numbers.
        """
        if self._compiled is None or len(state.request_ids) > MAX_BATCH:
            return self.observe_step(state, self.encoder.encode({k: x[:, 0] for k, x in sae_ins.items()}), live)
        rows = None if live is None else np.flatnonzero(live).astype(np.int32)
        if rows is not None and not len(rows):
            return []
        state.even = state.even and rows is None
        try:
            reached = self._compiled(state, [sae_ins[name] for name in self.encoder.hook_names], rows)
        except ArithmeticError as e:
            raise GuardError(_NOT_FINITE) from e
        return self._decide(state, rows) if reached or state.counting or self.streaming_rules.others else []

    def observe_step(
        self,
        state: BatchState,
        feature_acts: Float[Tensor, "B F"],
        live: npt.NDArray[np.bool_] | None = None,
    ) -> list[tuple[int, Verdict]]:
        """`observe_hidden` for activations that are encoded already."""
        if live is None:
            return self._step(state, None, *self._evidence(feature_acts))
        rows = np.flatnonzero(live)
        return self.observe_rows(state, rows, feature_acts[torch.from_numpy(rows).to(self.device)])

    def observe_rows(
        self, state: BatchState, rows: npt.NDArray[np.int64], feature_acts: Float[Tensor, "n F"]
    ) -> list[tuple[int, Verdict]]:
        """`observe_step` for one token of each of the n sequences in `rows` alone, in that order."""
        return self._step(state, rows, *self._evidence(feature_acts)) if len(rows) else []

    def observe_each(
        self, states: Sequence[BatchState], sae_ins: Mapping[str, Float[Tensor, "n d_in"]]
    ) -> list[list[Verdict]]:
        """Judge one response token of each of n sequences that have a state of their own, of one row, by the
        activations at the hook points. Returns the verdicts of each.

        Raises GuardError if the activations are not numbers.
        """
        if self._compiled is not None and len(states) <= MAX_BATCH:
            rows = [{name: x[i, None, None] for name, x in sae_ins.items()} for i in range(len(states))]
            found = [self.observe_hidden(state, row) for state, row in zip(states, rows, strict=True)]
        else:
            acts, evidence = self._evidence(self.encoder.encode(sae_ins))
            found = [self._step(s, None, acts[i : i + 1], evidence[i : i + 1]) for i, s in enumerate(states)]
        return [[verdict for _, verdict in fired] for fired in found]

    def _evidence(self, feature_acts: Float[Tensor, "n F"]) -> tuple[Float[Tensor, "n F"], npt.NDArray[np.float32]]:
        """The clipped activations, and what they add to the domains' averages: the one wait for the device."""
        clipped = feature_acts.clamp_max(self.bank.pooling.ceiling)
        return clipped, (clipped @ self.streaming_heads.weight).cpu().numpy()

    def _step(
        self,
        state: BatchState,
        rows: npt.NDArray[np.int64] | None,
        clipped: Float[Tensor, "n F"],
        evidence: npt.NDArray[np.float32],
    ) -> list[tuple[int, Verdict]]:
        reached = self._advance(state, rows, clipped, evidence)
        return self._decide(state, rows) if reached or state.counting or self.streaming_rules.others else []

    def _advance(
        self,
        state: BatchState,
        rows: npt.NDArray[np.int64] | None,
        clipped: Float[Tensor, "n F"],
        evidence: npt.NDArray[np.float32],
    ) -> bool:
        """Take one more token of the n sequences `rows`, or of all, into the state, up to the logits. Returns whether
        any of these is one that a rule counts. native.c does the same.
        """
        pooling = self.streaming_heads.pooling
        window, least = pooling.window, pooling.min_tokens
        where: Any
        here: Any
        count: Any
        if rows is None and state.even:  # slices cost a fraction of what indices do
            where = here = slice(None)
            count = int(state.count[0])
            slot = count % window
            first, divisor = max(count + 1 - window, 0), np.float64(max(min(count + 1, window), least))
        else:
            where = np.arange(len(state.request_ids)) if rows is None else rows
            count = state.count[where]
            here, slot = (torch.from_numpy(places).to(self.device) for places in (where, count % window))
            first = np.maximum(count + 1 - window, 0)
            divisor = np.clip(count + 1, least, max(window, least)).astype(np.float64)[:, None]
            state.even = state.even and rows is None
        if np.max(count) == state.logits.shape[1]:
            state.make_room()
        total = state.evidence[where, count] + evidence
        logits = (total - state.evidence[where, first]) / divisor + self.streaming_heads.offset
        reached = not (logits < self.streaming_rules.lowest).all()  # which NaN is not
        if reached and np.isnan(logits).any():
            raise GuardError(_NOT_FINITE)
        state.evidence[where, count + 1] = total
        state.logits[where, count] = logits
        state.recent[here, slot] = clipped
        state.count[where] += 1
        return reached

    def _decide(self, state: BatchState, rows: npt.NDArray[np.integer[Any]] | None) -> list[tuple[int, Verdict]]:
        """The rules that fire on the last token of the sequences `rows`, or of all."""
        table = self.streaming_rules
        rows = np.arange(len(state.request_ids)) if rows is None else rows
        count = state.count[rows]
        values = table.values(state.logits[rows, count - 1], partial(self._last_acts, state, rows))
        settled = count[:, None] >= table.settle_tokens
        counts = (values >= table.level) & settled
        runs = (state.runs[rows] + 1) * counts
        state.runs[rows] = runs
        if table.cools.any():
            self._release(state, rows, settled & ~counts)
        fired = (runs >= table.evidence_tokens) & ~state.latched[rows]
        state.latched[rows] |= fired
        in_force = (state.latched | state.prompted) & table.cools
        state.counting = bool(state.runs.any() or in_force.any())
        if not fired.any():
            return []
        verdicts = []
        for position, rule in np.argwhere(fired).tolist():
            row = int(rows[position])
            verdicts.append((row, self._response_verdict(state, row, rule, float(values[position, rule]))))
        for row, verdict in verdicts:
            self._record(state, row, [verdict])
        return verdicts

    def _release(self, state: BatchState, rows: npt.NDArray[np.integer[Any]], below: npt.NDArray[np.bool_]) -> None:
        """Release the rules in force that have been below their threshold for as many tokens as their cool-down."""
        table = self.streaming_rules
        in_force = state.latched[rows] | state.prompted[rows]
        rest = (state.rest[rows] + 1) * (in_force & below)
        ended = rest >= table.cooldown
        state.rest[rows] = rest * ~ended
        state.latched[rows] &= ~ended
        state.prompted[rows] &= ~ended
        state.released += [(int(rows[i]), table.rules[rule].rule.label) for i, rule in np.argwhere(ended).tolist()]

    def _last_acts(self, state: BatchState, rows: npt.NDArray[np.integer[Any]]) -> Float[Tensor, "n F"]:
        """The clipped activations of the last token of the sequences `rows`."""
        slot = (state.count[rows] - 1) % self.streaming_heads.pooling.window
        return state.recent[torch.from_numpy(rows).to(self.device), torch.from_numpy(slot).to(self.device)]

    def scores(self, state: BatchState, row: int) -> dict[str, float]:
        """Each domain's probability at the last judged token of a response; empty before the first."""
        count = int(state.count[row])
        if count == 0:
            return {}
        return {d: sigmoid(float(state.logits[row, count - 1, i])) for i, d in enumerate(self.domains)}

    def finish(self, state: BatchState, rows: Sequence[int] | None = None) -> list[tuple[int, Verdict]]:
        """At the end of the responses in `rows`, or of all: their best agreed logits, and rules that all counted tokens
        met, of a response shorter than their evidence.

        Where the average has not settled yet, the last token is the one that counts.
        """
        table, pooling = self.streaming_rules, self.bank.pooling
        verdicts = []
        for row in range(len(state.request_ids)) if rows is None else rows:
            if state.count[row] == 0:
                continue
            count = int(state.count[row])
            logits = torch.from_numpy(state.logits[row, :count])
            agreed = agreement(
                logits, torch.zeros(count, dtype=torch.long), pooling.evidence_tokens, settled=pooling.settle_tokens
            )
            state.best_response[row] = agreed.amax(0).numpy()
            here = np.array([row])
            last = table.values(state.logits[here, count - 1], partial(self._last_acts, state, here))[0]
            counted = count - table.settle_tokens + 1
            short = (state.runs[row] == counted) & (counted < table.evidence_tokens)
            met = np.where(counted >= 1, short, last >= table.level)
            for rule in np.flatnonzero(met & ~state.latched[row]).tolist():
                verdicts.append((row, self._response_verdict(state, row, rule, float(last[rule]))))
                state.latched[row, rule] = True
                self._record(state, row, [verdicts[-1][1]])
        return verdicts

    def hits(
        self, average: Float[Tensor, " F"], domain: int, top: int = TOP_FEATURES, *, streaming: bool = False
    ) -> tuple[FeatureHit, ...]:
        """The features that add most to a domain's logit, given their (average) clipped activations."""
        heads = self.streaming_heads if streaming else self.heads
        contribution = average * heads.weight[:, domain]
        order = contribution.argsort(descending=True)[:top].tolist()
        return tuple(self.hit(i, average, contribution) for i in order if float(contribution[i]) > 0)

    def hit(self, feature: int, acts: Float[Tensor, " F"], contribution: Float[Tensor, " F"]) -> FeatureHit:
        """What is told of one feature, given the activations and contributions of all."""
        record = self.bank.features[feature]
        return FeatureHit(
            id=record.id,
            layer=record.layer,
            explanation=record.explanation,
            activation=round(float(acts[feature]), 6),
            contribution=round(float(contribution[feature]), 6),
        )

    @property
    def hold_tokens(self) -> int:
        """Response tokens to judge before the first text may be shown, if a response that ends early is to be
        blocked before any of it is seen: those until the slowest blocking rule can fire for the first time."""
        blocking = (r for r in self.streaming_rules.rules if r.rule.action == "block")
        return max((r.settle_tokens - 1 + r.evidence_tokens for r in blocking), default=0)

    def _response_verdict(self, state: BatchState, row: int, rule: int, value: float) -> Verdict:
        count, pooling = int(state.count[row]), self.streaming_heads.pooling
        bound = self.streaming_rules.rules[rule]
        if bound.head is None:
            acts = self._last_acts(state, np.array([row]))[0]
        else:
            acts = state.recent[row].sum(0) / max(min(count, pooling.window), pooling.min_tokens)
        return self._verdict(bound, "response", state.request_ids[row], count - 1, value, acts, streaming=True)

    def _verdict(
        self,
        bound: BoundRule,
        phase: Phase,
        request_id: str,
        token: int,
        value: float,
        acts: Float[Tensor, " F"],
        *,
        streaming: bool = False,
    ) -> Verdict:
        """value: what the rule compared; acts: the features' activations that explain it."""
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

    def _hits_of(self, bound: BoundRule, acts: Float[Tensor, " F"]) -> tuple[FeatureHit, ...]:
        """The most active of the features that a rule looks at."""
        weight = torch.zeros_like(acts)
        if bound.domain in self.domains:
            weight = self.heads.weight[:, self.domains.index(bound.domain)]
        order = sorted(bound.columns.tolist(), key=lambda i: -float(acts[i]))[:TOP_FEATURES]
        return tuple(self.hit(i, acts, acts * weight) for i in order if float(acts[i]) > 0)

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

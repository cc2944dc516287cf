"""Judging sequences as they grow: a prompt that lies there whole, then a response token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.heads import agreement
from guard.errors import GuardError
from guard.events import Verdict
from guard.judge import NOT_FINITE, Floats, Judge, OnDevice, on_host, sigmoid
from guard.state import BatchState


class StreamJudge(Judge):
    """Adds what a sequence remembers, which lies in a `BatchState`; here is none of it."""

    def begin(self, request_ids: Sequence[str]) -> BatchState:
        """Fresh state for a batch of sequences."""
        return BatchState.create(
            request_ids,
            window=self.streaming_heads.pooling.window,
            features=len(self.bank.features),
            domains=len(self.domains),
            rules=len(self.streaming_rules.rules),
        )

    def observe_prompt(
        self,
        state: BatchState,
        row: int,
        feature_acts: npt.NDArray[Any] | OnDevice,
        segment: npt.NDArray[Any] | OnDevice,
        positions: npt.NDArray[Any] | OnDevice,
    ) -> list[Verdict]:
        """Judge the whole prompt of sequence `row`: its observed tokens, their segments, their positions in it."""
        acts, segments = on_host(feature_acts), on_host(segment)
        if not len(acts):
            return []
        judged = self.judge(acts, segments)
        state.best_prompt[row] = judged.agreed.max(0)
        verdicts = self.apply_rules("prompt", state.request_ids[row], judged, acts, segments, positions)
        self._record(state, row, verdicts)
        table, fired = self.streaming_rules, {verdict.rule for verdict in verdicts}
        state.prompted[row] = [bound.rule.label in fired for bound in table.rules]
        state.counting = state.counting or bool((state.prompted & table.cools).any())
        return verdicts

    def observe_step(
        self,
        state: BatchState,
        feature_acts: npt.NDArray[Any] | OnDevice,
        live: npt.NDArray[np.bool_] | None = None,
    ) -> list[tuple[int, Verdict]]:
        """Judge one response token of every sequence (of those in `live`, if given) by its activations (B, F).
        Returns (row, verdict) pairs.

        Raises GuardError if the activations are not numbers.
        """
        acts: Any = feature_acts
        if live is None:
            return self._step(state, None, *self._evidence(acts))
        rows = np.flatnonzero(live)
        return self.observe_rows(state, rows, acts[rows])

    def observe_rows(
        self, state: BatchState, rows: npt.NDArray[np.int64], feature_acts: npt.NDArray[Any] | OnDevice
    ) -> list[tuple[int, Verdict]]:
        """`observe_step` for one token of each of the n sequences in `rows` alone, in that order."""
        return self._step(state, rows, *self._evidence(feature_acts)) if len(rows) else []

    def _evidence(self, feature_acts: Any) -> tuple[Any, Floats]:
        """The clipped activations (n, F), where the state keeps them, and (n, D) what they add to the domains'
        averages."""
        clipped = self.streaming_heads.clip(feature_acts)
        return clipped, clipped @ self.streaming_heads.weight

    def _step(
        self, state: BatchState, rows: npt.NDArray[np.int64] | None, clipped: Any, evidence: Floats
    ) -> list[tuple[int, Verdict]]:
        reached = self._advance(state, rows, clipped, evidence)
        return self._decide(state, rows) if reached or state.counting or self.streaming_rules.others else []

    def _advance(self, state: BatchState, rows: npt.NDArray[np.int64] | None, clipped: Any, evidence: Floats) -> bool:
        """Take one more token of the n sequences `rows`, or of all, into the state, up to the logits. Returns whether
        any of these is one that a rule counts. native.c does the same.
        """
        pooling = self.streaming_heads.pooling
        window, least = pooling.window, pooling.min_tokens
        where: Any
        count: Any
        if rows is None and state.even:  # slices cost a fraction of what indices do
            where = slice(None)
            count = int(state.count[0])
            first, divisor = max(count + 1 - window, 0), np.float64(max(min(count + 1, window), least))
        else:
            where = np.arange(len(state.request_ids)) if rows is None else rows
            count = state.count[where]
            first = np.maximum(count + 1 - window, 0)
            divisor = np.clip(count + 1, least, max(window, least)).astype(np.float64)[:, None]
            state.even = state.even and rows is None
        if np.max(count) == state.logits.shape[1]:
            state.make_room()
        total = state.evidence[where, count] + evidence
        logits = (total - state.evidence[where, first]) / divisor + self.streaming_heads.bias
        reached = not (logits < self.streaming_rules.lowest).all()  # which NaN is not
        if reached and np.isnan(logits).any():
            raise GuardError(NOT_FINITE)
        state.evidence[where, count + 1] = total
        state.logits[where, count] = logits
        state.remember(where, count % window, clipped)
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

    def _last_acts(self, state: BatchState, rows: npt.NDArray[np.integer[Any]]) -> Floats:
        """(n, F) the clipped activations of the last token of the sequences `rows`."""
        return on_host(state.recent[rows, (state.count[rows] - 1) % self.streaming_heads.pooling.window])

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
            segment = np.zeros(count, dtype=np.int64)
            agreed = agreement(
                state.logits[row, :count], segment, pooling.evidence_tokens, settled=pooling.settle_tokens
            )
            state.best_response[row] = agreed.max(0)
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
            acts = on_host(state.recent[row].sum(0)) / max(min(count, pooling.window), pooling.min_tokens)
        return self.verdict(bound, "response", state.request_ids[row], count - 1, value, acts, streaming=True)

    @staticmethod
    def _record(state: BatchState, row: int, verdicts: list[Verdict]) -> None:
        state.verdicts[row].extend(verdicts)
        if any(v.action == "block" for v in verdicts):
            state.blocked[row] = True

"""The judge of a live model: it adds the encoder of activations on the model's device and the compiled step.

It knows nothing of any engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Bank
from guard.encoder import SelectedEncoder
from guard.errors import GuardError
from guard.events import Verdict
from guard.judge import NOT_FINITE
from guard.native import MAX_BATCH, CompiledStep, HookRows, is_half, library
from guard.policy import Policy
from guard.state import BatchState
from guard.stream_judge import StreamJudge


class Monitor(StreamJudge):
    """Judges sequences with a bank under a policy. Holds no state of any sequence: that is in `BatchState`."""

    def __init__(self, bank: Bank, policy: Policy, device: torch.device) -> None:
        super().__init__(bank, policy)
        self.device = device
        self.encoder = SelectedEncoder(bank, device)
        self._weight = torch.from_numpy(self.streaming_heads.weight).to(device)
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
            self.streaming_heads.weight,
            self.streaming_heads.bias,
            self.streaming_rules.lowest,
            pooling=self.streaming_heads.pooling,
        )

    @property
    def compiled(self) -> bool:
        """Whether decoding steps of small batches are one compiled call."""
        return self._compiled is not None

    def begin(self, request_ids: Sequence[str]) -> BatchState:
        """Fresh state for a batch of sequences. The features' own history stays on the device."""
        return BatchState.create(
            request_ids,
            window=self.streaming_heads.pooling.window,
            features=self.encoder.n_features,
            domains=len(self.domains),
            rules=len(self.streaming_rules.rules),
            device=self.device,
        )

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
            raise GuardError(NOT_FINITE) from e
        return self._decide(state, rows) if reached or state.counting or self.streaming_rules.others else []

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

    def _evidence(self, feature_acts: Any) -> tuple[Tensor, npt.NDArray[np.float32]]:
        """The clipped activations, and what they add to the domains' averages: the one wait for the device."""
        clipped: Tensor = feature_acts.clamp_max(self.bank.pooling.ceiling)
        return clipped, (clipped @ self._weight).cpu().numpy()

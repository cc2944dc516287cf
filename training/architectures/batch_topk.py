"""BatchTopK: of a batch the k * batch largest pre-activations are active, so that hard tokens may use more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions
from training.architectures.sparse import SparseArchitecture, SparseOptions
from training.kernels import SparseActs, batch_topk

_DECAY = 0.9  # of the threshold a step: a slower average lags behind while the activations still grow
_GUESS = 0.8  # of the last cut: it rarely falls by more in a step, and little more than k a token passes


@dataclass(kw_only=True, eq=False)
class BatchTopK(SparseArchitecture):
    """BatchTopK SAE (Bussmann et al., 2024). Exported as a JumpReLU with one threshold for all features."""

    name: ClassVar[str] = "batch_topk"
    Options: ClassVar[type[ArchitectureOptions]] = SparseOptions

    threshold: float = 0.0
    """Moving average of the smallest active pre-activation."""
    _last_cut: float = 0.0  # saves time alone, so it is no buffer

    def _select(self, sae_in: Float[Tensor, "batch d_in"]) -> SparseActs:
        acts, self._last_cut = batch_topk(
            lambda: self._pre_activations(sae_in),
            self.options.k,
            self.replicas.rows(sae_in.shape[0]),
            guess=_GUESS * self._last_cut,
            replicas=self.replicas,
        )
        smallest = self.replicas.least(float(acts.values.min()) if acts.values.numel() else math.inf)
        if smallest < math.inf:
            self.threshold = smallest if self.threshold == 0.0 else _DECAY * self.threshold + (1 - _DECAY) * smallest
        return acts

    def buffers(self) -> dict[str, Tensor]:
        """Everything besides the parameters that the next step depends on."""
        return {**super().buffers(), "threshold": torch.tensor(self.threshold, dtype=torch.float64)}

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Take over what `buffers` gave."""
        super().load_buffers(buffers)
        self.threshold = float(buffers["threshold"])

    def export(self, hook_name: str) -> SAE:
        """The JumpReLU form: one threshold for all features, input normalisation folded in."""
        return SAE(
            W_enc=self.W_enc.clone(memory_format=torch.contiguous_format),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=torch.full_like(self.b_enc, self.threshold * self.norm),
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )

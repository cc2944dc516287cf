"""TopK: of each token the k largest pre-activations are active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions
from training.architectures.sparse import SparseArchitecture, SparseOptions
from training.kernels import SparseActs, topk_rows


@dataclass(kw_only=True, eq=False)
class TopK(SparseArchitecture):
    """TopK SAE (Gao et al., 2024)."""

    name: ClassVar[str] = "topk"
    Options: ClassVar[type[ArchitectureOptions]] = SparseOptions

    def _select(self, sae_in: Float[Tensor, "batch d_in"]) -> SparseActs:
        return SparseActs.stack([topk_rows(pre, self.options.k) for pre in self._pre_activations(sae_in)])

    def export(self, hook_name: str) -> SAE:
        """The TopK form, input normalisation folded in."""
        return SAE(
            W_enc=self.W_enc.clone(memory_format=torch.contiguous_format),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=torch.zeros_like(self.b_enc),
            k=self.options.k,
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )

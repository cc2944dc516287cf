"""ReLU: every positive pre-activation is active, and a penalty on the activations keeps them few."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions
from training.architectures.dense import DenseArchitecture, DenseOptions, Forward, decode, encode


class ReLUOptions(DenseOptions):
    """What the ReLU SAE lets its user choose."""

    penalty: Literal["l1", "tanh"] = "l1"
    """l1: sum of activations (Bricken et al., 2023). tanh: sum of tanh(tanh_scale * activation) (Lindsey et al., 2025),
    which does not shrink large activations."""
    coefficient: float = Field(default=5.0, ge=0)
    """Weight of the penalty beside the squared error, both of inputs whose coordinates' mean square is 1."""
    tanh_scale: float = Field(default=4.0, gt=0)


@dataclass(kw_only=True, eq=False)
class ReLU(DenseArchitecture):
    """ReLU SAE. loss: d_in / variance * (|x_hat - x|^2 + coefficient * penalty), sums over the batch."""

    name: ClassVar[str] = "relu"
    Options: ClassVar[type[ArchitectureOptions]] = ReLUOptions

    options: ReLUOptions
    b_enc: Float[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.b_enc = self.W_enc_T.new_zeros(self.d_sae)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes."""
        return {"W_enc_T": self.W_enc_T, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}

    def _forward(self, p: dict[str, Tensor], x: Tensor, unit: Tensor, warmth: float) -> Forward:
        pre = encode(x, p, p["b_enc"])
        acts = pre.relu()
        error = decode(acts, p["W_dec"], p["b_dec"]) - x
        penalty = acts.sum() if self.options.penalty == "l1" else torch.tanh(self.options.tanh_scale * acts).sum()
        loss = (error.pow(2).sum() + warmth * self.options.coefficient * penalty) / unit
        return Forward(loss, error, pre > 0, pre)

    def export(self, hook_name: str) -> SAE:
        """The JumpReLU form with thresholds of zero, input normalisation folded in."""
        return SAE(
            W_enc=self.W_enc.clone(memory_format=torch.contiguous_format),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=torch.zeros_like(self.b_enc),
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )

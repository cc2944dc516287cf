"""Gated: one half of the encoder decides which features are active, the other how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions
from training.architectures.dense import DenseArchitecture, DenseOptions, Forward, decode, encode


class GatedOptions(DenseOptions):
    """What the gated SAE lets its user choose."""

    coefficient: float = Field(default=5.0, ge=0)
    """Weight of the gate's L1 penalty beside the squared error, of inputs whose coordinates' mean square is 1."""


@dataclass(kw_only=True, eq=False)
class Gated(DenseArchitecture):
    """Gated SAE (Rajamanoharan et al., 2024, arXiv 2404.16014), the two encoders tied by a scale exp(r_mag).

    gate = (x - b_dec) W_enc + b_gate, a = 1[gate > 0] * relu((x - b_dec) W_enc * exp(r_mag) + b_mag)
    loss: d_in / variance * (|x_hat - x|^2 + coefficient * sum relu(gate) + |relu(gate) W_dec + b_dec - x|^2), where the
    last term, which trains the gate, leaves W_dec and b_dec of the decoder alone.
    """

    name: ClassVar[str] = "gated"
    Options: ClassVar[type[ArchitectureOptions]] = GatedOptions

    options: GatedOptions
    b_gate: Float[Tensor, " d_sae"] = field(init=False)
    b_mag: Float[Tensor, " d_sae"] = field(init=False)
    r_mag: Float[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.b_gate, self.b_mag, self.r_mag = (self.W_enc_T.new_zeros(self.d_sae) for _ in range(3))

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes."""
        return {
            "W_enc_T": self.W_enc_T,
            "W_dec": self.W_dec,
            "b_gate": self.b_gate,
            "b_mag": self.b_mag,
            "r_mag": self.r_mag,
            "b_dec": self.b_dec,
        }

    def _forward(self, p: dict[str, Tensor], x: Tensor, unit: Tensor, warmth: float) -> Forward:
        shared = encode(x, p, torch.zeros_like(p["b_gate"]))
        gate = shared + p["b_gate"]
        acts = (gate > 0) * (shared * p["r_mag"].exp() + p["b_mag"]).relu()
        error = decode(acts, p["W_dec"], p["b_dec"]) - x
        open_gate = gate.relu()
        gate_error = decode(open_gate, p["W_dec"].detach(), p["b_dec"].detach()) - x
        penalty = warmth * self.options.coefficient * open_gate.sum()
        loss = (error.pow(2).sum() + penalty + gate_error.pow(2).sum()) / unit
        return Forward(loss, error, acts > 0, gate)

    def export(self, hook_name: str) -> SAE:
        """The JumpReLU that is the same function: the gate opens where the magnitude passes a threshold."""
        scale = self.r_mag.exp()
        return SAE(
            W_enc=(self.W_enc * scale).contiguous(),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_mag * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=(self.b_mag - scale * self.b_gate).clamp_min(0) * self.norm,
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )

"""JumpReLU: a feature is active above a threshold of its own, which is trained through the jump."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from feature_bank.sae import SAE
from training.architectures.base import ArchitectureOptions
from training.architectures.dense import DenseArchitecture, DenseOptions, Forward, decode, encode
from training.kernels import kth_largest

_SAMPLE_ROWS = 1024


class JumpReLUOptions(DenseOptions):
    """What the JumpReLU SAE lets its user choose."""

    l0_target: float | None = Field(default=32.0, gt=0)
    """The batch's mean number of active features that the penalty aims at; None: fewer is always better."""
    l0_coefficient: float = Field(default=1.0, ge=0)
    """Weight of (l0 / l0_target - 1)^2 beside the fraction of variance unexplained; without a target, of the number of
    active features beside the squared error."""
    bandwidth: float = Field(default=0.1, gt=0)
    """Width of the window around the threshold in which pre-activations move it; inputs' mean square is 1."""
    initial_threshold: float | None = Field(default=None, ge=0)
    """If not given, where the untrained features meet the target, or 0.1 without one."""
    aux_k: int | None = Field(default=None, ge=1)
    """How many dead features a token try to reconstruct the residual; d_in / 2 if not given."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)


@dataclass(kw_only=True, eq=False)
class JumpReLU(DenseArchitecture):
    """JumpReLU SAE (Rajamanoharan et al., 2024, arXiv 2407.14435), thresholds trained by straight-through estimates.

    loss: d_in * (|x_hat - x|^2 / variance + l0_coefficient * (l0 / l0_target - 1)^2), plus the auxiliary loss of the
    top-k family for dead features. The threshold itself is trained, not its logarithm, and kept at or above zero.
    """

    name: ClassVar[str] = "jumprelu"
    Options: ClassVar[type[ArchitectureOptions]] = JumpReLUOptions

    options: JumpReLUOptions
    b_enc: Float[Tensor, " d_sae"] = field(init=False)
    threshold: Float[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.b_enc = self.W_enc_T.new_zeros(self.d_sae)
        self.threshold = self.W_enc_T.new_zeros(self.d_sae)

    @torch.no_grad()
    def _prepare(self, scaled: Float[Tensor, "n d_in"]) -> None:
        initial = self.options.initial_threshold
        if initial is None and self.options.l0_target is not None:
            rows = scaled[:: max(1, scaled.shape[0] // _SAMPLE_ROWS)]
            pre = encode(rows, self.parameters(), self.b_enc).flatten()
            rank = min(pre.numel(), max(1, round(self.options.l0_target * rows.shape[0])))
            initial = max(0.0, float(kth_largest(pre, rank)))
        self.threshold.fill_(0.1 if initial is None else initial)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes."""
        return {
            "W_enc_T": self.W_enc_T,
            "W_dec": self.W_dec,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
            "threshold": self.threshold,
        }

    def _forward(self, p: dict[str, Tensor], x: Tensor, unit: Tensor, warmth: float) -> Forward:
        pre = encode(x, p, p["b_enc"])
        acts, active = Jump.apply(  # type: ignore[no-untyped-call]
            pre, p["threshold"], self.options.bandwidth
        )
        error = decode(acts, p["W_dec"], p["b_dec"]) - x
        if self.options.l0_target is None:
            penalty = active.sum() / unit
        else:
            own = active.sum()
            (whole,) = self.replicas.sums(own.detach())
            whole = own + (whole - own.detach())  # the whole batch's number, with the gradient of these rows
            rows = self.replicas.rows(x.shape[0])
            penalty = (whole / (rows * self.options.l0_target) - 1) ** 2 * self.d_in
        loss = error.pow(2).sum() / unit + warmth * self.options.l0_coefficient * penalty
        return Forward(loss, error, active.detach() > 0, pre)

    def _auxiliary(self, p: dict[str, Tensor], step: Forward, dead: Tensor, unit: Tensor) -> Tensor | None:
        aux_k = self.options.aux_k or max(1, self.d_in // 2)
        acts = step.pre[:, dead].relu()
        if dead.numel() > aux_k:
            acts = acts * (acts >= kth_largest(acts.detach(), aux_k))
        share = self.options.aux_coefficient * min(1.0, dead.numel() / aux_k)
        with torch.autocast(acts.device.type, enabled=False):
            residual = torch.addmm(step.error.detach(), acts, p["W_dec"][dead])  # the target is x - x_hat
        return share * residual.pow(2).sum() / unit

    def renormalise(self) -> None:
        """Put the decoder\'s rows back on the unit sphere, and thresholds at or above zero."""
        super().renormalise()
        self.threshold.clamp_(min=0.0)

    def export(self, hook_name: str) -> SAE:
        """The SAE as it is, input normalisation folded in."""
        return SAE(
            W_enc=self.W_enc.clone(memory_format=torch.contiguous_format),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=self.threshold * self.norm,
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )


class Jump(torch.autograd.Function):
    """z -> (z * 1[z > threshold], 1[z > threshold]).

    The gradient at the threshold, which does not exist at a jump, is estimated with a rectangle kernel:
    -(threshold * grad_acts + grad_active) / bandwidth where |z - threshold| < bandwidth / 2, summed over the batch
    (arXiv 2407.14435, equations 11 and 12). z gets the gradient of the activations alone.
    """

    @staticmethod
    def forward(
        ctx: Any, pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
    ) -> tuple[Tensor, Tensor]:
        """Both outputs have the shape of `pre`."""
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients at `pre` and `threshold`."""
        grad_acts, grad_active = grads
        pre, threshold, active = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        at_jump = (threshold * grad_acts + grad_active) * window
        return grad_acts * active, at_jump.sum(0) / -ctx.bandwidth, None

"""The common step of architectures whose sparsity is a penalty: many features fire, so autograd does the work."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from training.architectures.base import Architecture, ArchitectureOptions, StepStats, project, variance_of


class DenseOptions(ArchitectureOptions):
    """What architectures with a sparsity penalty let their user choose."""

    penalty_warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the training over which the penalty rises linearly from zero: else features die before they mean
    anything."""


class Forward(NamedTuple):
    """A forward pass of one batch, with gradients."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, "batch d_in"]
    """x_hat - x"""
    active: Bool[Tensor, "batch d_sae"]
    pre: Float[Tensor, "batch d_sae"]
    """What decides whether a feature fires."""


@dataclass(kw_only=True, eq=False)
class DenseArchitecture(Architecture):
    """An SAE that a penalty makes sparse. `unit` is the batch's variance over d_in; every loss is measured in it."""

    options: DenseOptions

    @abstractmethod
    def _forward(self, p: dict[str, Tensor], x: Tensor, unit: Tensor, warmth: float) -> Forward:
        """The loss on the normalised rows `x`, given parameters that want a gradient; `warmth` scales the penalty.

        `unit` is the whole batch's, so that the gradients of several replicas' losses add up to its gradient.
        """

    def _auxiliary(self, p: dict[str, Tensor], step: Forward, dead: Tensor, unit: Tensor) -> Tensor | None:  # noqa: ARG002
        """A loss that revives dead features, if the architecture has one."""
        return None

    def gradients(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"] | None = None,  # noqa: ARG002  # it reconstructs its input
        progress: float = 1.0,
    ) -> tuple[dict[str, Tensor], StepStats]:
        """See `Architecture.gradients`."""
        scaled = x * (1 / self.norm)
        rows = self.replicas.rows(x.shape[0])
        variance = variance_of(scaled - self.b_dec, self.replicas)
        unit = variance / self.d_in
        parameters = {name: p.detach().requires_grad_() for name, p in self.parameters().items()}
        warmth = min(1.0, progress / self.options.penalty_warmup) if self.options.penalty_warmup else 1.0
        with torch.enable_grad():
            step = self._forward(parameters, scaled, unit, warmth)
            squares, active, fired = self.replicas.sums(
                torch.linalg.vector_norm(step.error.detach()) ** 2, step.active.sum(), step.active.any(0)
            )
            dead = self._advance_clocks(fired, rows)
            auxiliary = self._auxiliary(parameters, step, dead, unit) if dead.numel() else None
            loss = step.loss if auxiliary is None else step.loss + auxiliary
        found = torch.autograd.grad(loss, list(parameters.values()))
        grads = dict(zip(parameters, found, strict=True))
        project(grads["W_dec"], self.W_dec, torch.linalg.vecdot(grads["W_dec"], self.W_dec))
        stats = StepStats(
            fvu=float(squares / variance),
            l0=float(active) / rows,
            dead_fraction=dead.numel() / self.d_sae,
        )
        return grads, stats


def encode(x: Tensor, p: dict[str, Tensor], bias: Tensor) -> Float[Tensor, "batch d_sae"]:
    """(x - b_dec) W_enc + bias, in the parameters' precision whatever the product's."""
    return torch.nn.functional.linear(x - p["b_dec"], p["W_enc_T"], bias).to(bias.dtype)


def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Float[Tensor, "batch d_in"]:
    """acts W_dec + b_dec, in full precision: the loss is the small difference of this and x."""
    with torch.autocast(acts.device.type, enabled=False):
        return torch.addmm(b_dec, acts, W_dec)

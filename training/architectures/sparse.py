"""The top-k family's common step: a dense encoder product, then sparse arithmetic with hand-written gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from training.architectures.base import Architecture, ArchitectureOptions, StepStats, project, variance_of
from training.kernels import SparseActs, SparseGrads, kth_largest, sparse_backward, sparse_decode

# Pre-activations held at a time: on CPU 24 MB, which the allocator hands out again without fresh pages each step
_CHUNK_ELEMENTS = {"cpu": 6 * 2**20, "cuda": 2**28}


class SparseOptions(ArchitectureOptions):
    """What the top-k family lets its user choose."""

    k: int = Field(default=32, ge=1)
    """Active features a token."""
    aux_k: int | None = Field(default=None, ge=1)
    """How many dead features a token try to reconstruct the residual; d_out / 2 if not given."""
    aux_coefficient: float = Field(default=1 / 32, ge=0)


@dataclass(kw_only=True, eq=False)
class SparseArchitecture(Architecture):
    """An SAE of which few features a token are active, with auxiliary-loss revival of dead ones (Gao et al., 2024).

    loss: d_out / variance * (|x_hat - x|^2 + aux_coefficient * min(1, dead / aux_k) * |x_aux - (x - x_hat)|^2), sums
    over the batch, where x_aux decodes each token's aux_k largest pre-activations among the dead features.
    """

    options: SparseOptions
    b_enc: Float[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.b_enc = self.W_enc_T.new_zeros(self.d_sae)

    @abstractmethod
    def _select(self, sae_in: Float[Tensor, "batch d_in"]) -> SparseActs:
        """The active features of the rows that are here."""

    @property
    def aux_k(self) -> int:
        """How many dead features a token try to reconstruct the residual."""
        return self.options.aux_k or max(1, self.W_dec.shape[1] // 2)

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes."""
        return {"W_enc_T": self.W_enc_T, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}

    @torch.no_grad()
    def gradients(
        self,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"] | None = None,
        progress: float = 1.0,  # noqa: ARG002  # there is no penalty to warm up
    ) -> tuple[dict[str, Tensor], StepStats]:
        """See `Architecture.gradients`."""
        sae_in, wanted, variance = self._inputs(x, target)
        acts = self._select(sae_in)
        unit = variance / wanted.shape[1]
        error, grad_out, grads = self._reconstruct(acts, sae_in, wanted, 2 / unit)
        squares, counts = self.replicas.sums(torch.linalg.vector_norm(error) ** 2, acts.counts())
        rows = self.replicas.rows(x.shape[0])
        dead = self._advance_clocks(counts > 0, rows)
        if dead.numel() and self.options.aux_coefficient:
            self._add_auxiliary(dead, sae_in, error, unit, grads)
        project(grads.W_dec, self.W_dec, grads.radial)
        found = {"W_enc_T": grads.W_enc_T, "W_dec": grads.W_dec, "b_enc": grads.b_enc}
        stats = StepStats(float(squares / variance), int(counts.sum()) / rows, dead.numel() / self.d_sae)
        return {**found, **self._outer_gradients(sae_in, grad_out, grads)}, stats

    def _inputs(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG002
        """What the encoder multiplies, what decode(acts) should equal, and the whole batch's variance."""
        centred = torch.add(-self.b_dec, x, alpha=1 / self.norm)
        return centred, centred, variance_of(centred, self.replicas)

    def _outer_gradients(self, sae_in: Tensor, grad_out: Tensor, grads: SparseGrads) -> dict[str, Tensor]:
        """Of what lies outside the two: b_dec is added to the reconstruction and subtracted from the input."""
        with torch.autocast(sae_in.device.type, enabled=False):
            return {"b_dec": grad_out.sum(0) - grads.b_enc @ self.W_enc_T}

    def _reconstruct(
        self, acts: SparseActs, sae_in: Tensor, wanted: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, SparseGrads]:
        """The error x_hat - x, the loss's gradient at the reconstruction (`scale` times the error), and behind it."""
        error = sparse_decode(acts, self.W_dec) - wanted
        grad_out = error * scale
        return error, grad_out, sparse_backward(acts, sae_in, grad_out, self.W_dec)

    def _pre_activations(self, sae_in: Float[Tensor, "batch d_in"]) -> Iterator[Float[Tensor, "rows d_sae"]]:
        """The encoder's product, some rows at a time: batch x d_sae is never held in whole."""
        limit = _CHUNK_ELEMENTS.get(sae_in.device.type, _CHUNK_ELEMENTS["cuda"])
        for part in torch.split(sae_in, max(1, limit // self.d_sae)):
            yield torch.addmm(self.b_enc, part, self.W_enc_T.T).to(self.W_dec.dtype)

    def _add_auxiliary(
        self, dead: Int[Tensor, " dead"], sae_in: Tensor, error: Tensor, unit: Tensor, grads: SparseGrads
    ) -> None:
        """Let the dead features with the largest pre-activations reconstruct the residual, encoder included."""
        encoder, decoder = self.W_enc_T[dead], self.W_dec[dead]
        acts = torch.addmm(self.b_enc[dead], sae_in, encoder.T).to(decoder.dtype).relu_()
        if dead.numel() > self.aux_k:
            acts *= acts >= kth_largest(acts, self.aux_k)
        with torch.autocast(sae_in.device.type, enabled=False):
            residual = torch.addmm(error, acts, decoder)  # the target is x - x_hat
            share = self.options.aux_coefficient * min(1.0, dead.numel() / self.aux_k)
            grad_out = residual * (2 * share / unit)
            grad_acts = (grad_out @ decoder.T).mul_(acts > 0)
            grads.W_dec.index_add_(0, dead, acts.T @ grad_out)
            grads.W_enc_T.index_add_(0, dead, grad_acts.T @ sae_in)
        grads.b_enc.index_add_(0, dead, grad_acts.sum(0))
        grads.radial.index_add_(0, dead, (grad_acts * acts).sum(0))

"""The BatchTopK sparse autoencoder while it is being trained: parameters, loss gradients, dead features, export."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE
from training.kernels import batch_topk_threshold, keep_above, sparse_backward, sparse_decode


class StepStats(NamedTuple):
    """What one step saw: fraction of variance unexplained, mean active features, share of dead features."""

    fvu: float
    l0: float
    dead_fraction: float


@dataclass(kw_only=True)
class BatchTopK:
    """BatchTopK SAE (Bussmann et al., 2024) with auxiliary-loss revival of dead features (Gao et al., 2024).

    Inputs are divided by `norm` (the data's root mean squared length over sqrt(d_in)) so that one learning rate
    serves every layer; `export` folds it back.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    k: int
    norm: float
    aux_k: int
    dead_after_tokens: int
    threshold: float = 0.0  # moving average of the smallest kept activation
    tokens_since_fired: Tensor = field(default_factory=lambda: torch.zeros(0))
    _last_cut: float = 0.0

    @classmethod
    def create(
        cls, sample: Float[Tensor, "n d_in"], *, d_sae: int, k: int, dead_after_tokens: int, seed: int
    ) -> BatchTopK:
        """Initialise from a sample of the data: b_dec at its mean, unit-norm random decoder, encoder its transpose."""
        generator = torch.Generator().manual_seed(seed)
        d_in = sample.shape[1]
        norm = float(sample.pow(2).sum(1).mean().sqrt() / math.sqrt(d_in))
        W_dec = torch.randn(d_sae, d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        return cls(
            W_enc=W_dec.T.clone().contiguous(),
            W_dec=W_dec,
            b_enc=torch.zeros(d_sae),
            b_dec=(sample / norm).mean(0),
            k=k,
            norm=norm,
            aux_k=d_in // 2,
            dead_after_tokens=dead_after_tokens,
            tokens_since_fired=torch.zeros(d_sae, dtype=torch.long),
        )

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes, by SAELens' names."""
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}

    def gradients(self, sae_in: Float[Tensor, "batch d_in"]) -> tuple[dict[str, Tensor], StepStats]:
        """Gradients of the mean squared error (over the batch's variance) plus 1/32 of the auxiliary loss.

        Also advances the dead-feature clocks and the threshold's moving average: call it once a step.
        """
        x = sae_in / self.norm
        batch = x.shape[0]
        centred = x - self.b_dec
        pre = torch.addmm(self.b_enc, centred, self.W_enc)
        cut = batch_topk_threshold(pre, self.k, guess=0.8 * self._last_cut)
        acts = keep_above(pre, cut)
        self._last_cut = cut
        error = sparse_decode(acts, self.W_dec) - centred  # x_hat - x
        variance = float((x - x.mean(0)).pow(2).sum()) + 1e-12
        grad_out = error * (2.0 / variance)
        grads = sparse_backward(acts, centred, grad_out, self.W_dec)
        W_enc, W_dec, b_enc = grads.W_enc.contiguous(), grads.W_dec, grads.b_enc

        if acts.values.numel():
            smallest = float(acts.values.min())
            self.threshold = smallest if self.threshold == 0.0 else 0.99 * self.threshold + 0.01 * smallest
        self.tokens_since_fired += batch
        self.tokens_since_fired[acts.cols] = 0
        dead = torch.nonzero(self.tokens_since_fired > self.dead_after_tokens).squeeze(1)
        if dead.numel():
            self._add_auxiliary(dead, pre, centred, error, variance, W_enc, W_dec, b_enc)
        # b_dec acts twice: it is added to the reconstruction and subtracted from the encoder's input
        b_dec = grad_out.sum(0) - self.W_enc @ b_enc
        # The decoder's rows stay on the unit sphere: drop the radial part of their gradient
        W_dec -= (W_dec * self.W_dec).sum(1, keepdim=True) * self.W_dec
        stats = StepStats(
            fvu=float(error.pow(2).sum()) / variance,
            l0=acts.values.numel() / batch,
            dead_fraction=dead.numel() / self.W_dec.shape[0],
        )
        return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, stats

    def _add_auxiliary(
        self,
        dead: Tensor,
        pre: Tensor,
        centred: Tensor,
        error: Tensor,
        variance: float,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
    ) -> None:
        """Let the dead features with the largest pre-activations reconstruct the residual, encoder included."""
        kept = min(self.aux_k, int(dead.numel()))
        values, positions = pre[:, dead].topk(kept, dim=1)
        acts = torch.zeros(pre.shape[0], dead.numel()).scatter_(1, positions, values.relu())
        decoder = self.W_dec[dead]
        residual = acts @ decoder + error  # target: x - x_hat
        scale = 2.0 / (32.0 * variance) * min(1.0, dead.numel() / self.aux_k)
        grad_out = residual * scale
        grad_acts = (grad_out @ decoder.T) * (acts > 0)
        W_dec.index_add_(0, dead, acts.T @ grad_out)
        W_enc.index_add_(1, dead, centred.T @ grad_acts)
        b_enc.index_add_(0, dead, grad_acts.sum(0))

    def renormalise(self) -> None:
        """Put the decoder's rows back on the unit sphere after an optimiser step."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def export(self, hook_name: str) -> SAE:
        """The JumpReLU form: one threshold for all features, input normalisation folded in."""
        return SAE(
            W_enc=self.W_enc.clone(),
            W_dec=self.W_dec.clone(),
            b_enc=self.b_enc * self.norm,
            b_dec=self.b_dec * self.norm,
            threshold=torch.full((self.W_dec.shape[0],), self.threshold * self.norm),
            hook_name=hook_name,
            apply_b_dec_to_input=True,
        )

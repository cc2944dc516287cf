"""EleutherAI sparsify: its `SparseCoder` with plain Adam.

Its `Trainer` cannot be given activations: it runs a language model and trains inside the model's hooks. `step`
therefore does, with its own pieces and in its order, what that hook and the end of `Trainer.fit`'s loop do for one
hook point: unit norm, fused encoder, decode, dead mask, loss, projected gradient, Adam, clocks. On a CPU it uses its
fallback decoder (`embedding_bag`), which it chooses itself where there is no Triton.

Chosen: `optimizer="adam"`; its auxiliary loss with 1/32 (off by default); gradients clipped at 1.0, which it does not
do; activations divided by their root mean squared length over sqrt(d_in), which it does not do either, so that the
common learning rate means the same to its biases as to the others'.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers import AUX_COEFFICIENT, CLIP_NORM, HOOK_NAME, Arm, Family, Setting
from feature_bank.sae import SAE


class SparsifyArm:
    """One sparse coder, its optimiser and its clocks."""

    def __init__(self, setting: Setting, sample: Float[Tensor, "n d_in"]) -> None:
        if setting.device == "cpu":  # its own switch, read at import: Triton may be installed without a device for it
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(setting.seed)
        self.norm = float(sample.float().pow(2).mean().sqrt())
        self.dead_after_tokens = setting.dead_after_tokens
        config = SparseCoderConfig(num_latents=setting.d_sae, k=setting.k)
        self.sae: Any = SparseCoder(setting.d_in, config, setting.device, dtype=torch.float32)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=setting.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, setting.rate)
        self.tokens_since_fired = torch.zeros(setting.d_sae, dtype=torch.long, device=setting.device)
        self.did_fire = torch.zeros(setting.d_sae, dtype=torch.bool, device=setting.device)
        self.started = False

    def step(self, batch: Float[Tensor, "batch d_in"]) -> None:
        """What its trainer does with the activations of one hook point."""
        x = batch / self.norm
        if not self.started:
            self.sae.b_dec.data = x.mean(0)
            self.started = True
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x, dead_mask=self.tokens_since_fired > self.dead_after_tokens)
        self.did_fire[out.latent_indices.flatten()] = True
        (out.fvu + AUX_COEFFICIENT * out.auxk_loss).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        with torch.no_grad():
            self.tokens_since_fired += len(batch)
            self.tokens_since_fired[self.did_fire] = 0
            self.did_fire.zero_()

    def export(self) -> SAE:
        """Its weights, unit-norm as at the beginning of a step, with the scale folded into the biases."""
        self.sae.set_decoder_norm_to_unit_norm()
        state = {name: tensor.detach().float().cpu() for name, tensor in self.sae.state_dict().items()}
        return SAE(
            W_enc=state["encoder.weight"].T.contiguous(),
            W_dec=state["W_dec"],
            b_enc=state["encoder.bias"] * self.norm,
            b_dec=state["b_dec"] * self.norm,
            threshold=torch.zeros_like(state["encoder.bias"]),
            hook_name=HOOK_NAME,
        )


def create(family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """See `benchmarks.peers.Factory`. Raises ValueError for a kind that it does not have."""
    if family != "topk":
        raise ValueError(f"sparsify has no {family} SAE")
    return SparsifyArm(setting, sample)

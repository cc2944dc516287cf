"""dictionary_learning: its `TopKTrainer` and `BatchTopKTrainer`, driven by their own `update(step, batch)`.

Chosen: activations divided by the root of their mean squared length, as its `trainSAE(normalize_activations=True)` does
with each batch; its auxiliary weight of 1/32 and its bias from the first batch's geometric median, as they are by
default. Its moving average of the inference threshold begins by default at step 1,000; here at nine tenths of the run,
so that a short run has one. Clipping is at 1.0 in its step.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers import AUX_COEFFICIENT, HOOK_NAME, Arm, Family, Setting
from feature_bank.sae import SAE


class DictionaryLearningArm:
    """One of its trainers."""

    def __init__(self, family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.norm = float(sample.float().pow(2).sum(1).mean().sqrt())
        self.autocast = setting.autocast
        trainer = TopKTrainer if family == "topk" else BatchTopKTrainer
        self.trainer: Any = trainer(
            steps=setting.steps,
            activation_dim=setting.d_in,
            dict_size=setting.d_sae,
            k=setting.k,
            layer=0,
            lm_name="",
            lr=setting.lr,
            auxk_alpha=AUX_COEFFICIENT,
            warmup_steps=setting.warmup_steps,
            decay_start=setting.steps - setting.decay_steps,
            threshold_start_step=setting.steps * 9 // 10,
            seed=setting.seed,
            device=setting.device,
        )
        self.trainer.dead_feature_threshold = setting.dead_after_tokens
        self.family = family
        self.number = 0

    def step(self, batch: Float[Tensor, "batch d_in"]) -> None:
        """What `trainSAE` does with a batch."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            self.trainer.update(self.number, batch / self.norm)
        self.number += 1

    def export(self) -> SAE:
        """Its weights with the biases scaled up, as `trainSAE` saves them."""
        ae = self.trainer.ae
        ae.scale_biases(self.norm)
        threshold = float(ae.threshold) if self.family == "batchtopk" else 0.0
        return SAE(
            W_enc=ae.encoder.weight.detach().float().cpu().T.contiguous(),
            W_dec=ae.decoder.weight.detach().float().cpu().T.contiguous(),
            b_enc=ae.encoder.bias.detach().float().cpu(),
            b_dec=ae.b_dec.detach().float().cpu(),
            threshold=torch.full((ae.dict_size,), max(0.0, threshold)),
            hook_name=HOOK_NAME,
        )


def create(family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """See `benchmarks.peers.Factory`."""
    return DictionaryLearningArm(family, setting, sample)

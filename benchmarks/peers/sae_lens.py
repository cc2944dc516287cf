"""sae-lens: its `TopKTrainingSAE` and `BatchTopKTrainingSAE`, stepped by its `SAETrainer`.

The three calls of `step` are those of the trainer's own `fit` loop, without logging and checkpoints. Chosen:
`normalize_activations="expected_average_only_in"` (its dataset-wise scale, applied in its step),
the decoder's norm of 0.1 at the start and the auxiliary loss with a coefficient of 1, as they are by default. Clipping
is at 1.0 in its step.

TopK has two forms. `create` makes the default one: dense activations, `rescale_acts_by_decoder_norm`. `create_sparse`
makes the one with `use_sparse_activations`, which its documentation recommends for float32 without autocast; it needs
`rescale_acts_by_decoder_norm=False`, for with both the backward pass ends with an error on a CPU (6.54, torch 2.13).
BatchTopK has the dense form alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers import HOOK_NAME, Arm, Family, Setting
from feature_bank.sae import SAE


class SaeLensArm:
    """One training SAE and its trainer."""

    def __init__(
        self, family: Family, setting: Setting, sample: Float[Tensor, "n d_in"], *, sparse: bool = False
    ) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(setting.seed)
        about: dict[str, Any] = {
            "d_in": setting.d_in,
            "d_sae": setting.d_sae,
            "k": setting.k,
            "dtype": "float32",
            "device": setting.device,
            "normalize_activations": "expected_average_only_in",
        }
        self.sae: Any
        if family == "topk":
            about |= {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
            self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(**about))
        else:
            self.sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**about))
        config = SAETrainerConfig(
            total_training_samples=setting.steps * setting.batch_tokens,
            train_batch_size_samples=setting.batch_tokens,
            lr=setting.lr,
            lr_end=setting.lr,  # the constant schedule does not read it
            lr_warm_up_steps=setting.warmup_steps,
            lr_decay_steps=setting.decay_steps,
            device=setting.device,
            autocast=setting.autocast,
            dead_feature_window=max(1, setting.dead_after_tokens // setting.batch_tokens),
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer: Any = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))
        self.trainer.activation_scaler.estimate_scaling_factor(
            d_in=setting.d_in, data_provider=_once(sample), n_batches_for_norm_estimate=1
        )

    def step(self, batch: Float[Tensor, "batch d_in"]) -> None:
        """What `SAETrainer.fit` does with a batch."""
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def export(self) -> SAE:
        """Its inference weights: input scale and decoder norm folded in, as it saves them."""
        self.sae.fold_activation_norm_scaling_factor(self.trainer.activation_scaler.scaling_factor)
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in self.sae.state_dict().items()}
        self.sae.cpu().process_state_dict_for_saving_inference(state)
        return SAE(
            W_enc=state["W_enc"],
            W_dec=state["W_dec"],
            b_enc=state["b_enc"],
            b_dec=state["b_dec"],
            threshold=state.get("threshold", torch.zeros_like(state["b_enc"])),
            hook_name=HOOK_NAME,
            apply_b_dec_to_input=bool(self.sae.cfg.apply_b_dec_to_input),
        )


def _once(sample: Tensor) -> Iterator[Tensor]:
    yield sample


def create(family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """See `benchmarks.peers.Factory`."""
    return SaeLensArm(family, setting, sample)


def create_sparse(family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """With sparse activations; see `benchmarks.peers.Factory`. Raises ValueError for a kind that has no such form."""
    if family != "topk":
        raise ValueError(f"sae-lens has no sparse form of {family}")
    return SaeLensArm(family, setting, sample, sparse=True)

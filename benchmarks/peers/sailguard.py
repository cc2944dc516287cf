"""sailguard itself: the step that `training.trainer` makes, on `training.run_state.RunState`, with its defaults."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from benchmarks.peers import CLIP_NORM, HOOK_NAME, Arm, Family, Setting
from feature_bank.sae import SAE

ARCHITECTURES = {"topk": "topk", "batchtopk": "batch_topk"}


class SailguardArm:
    """One run of the trainer, without its reading ahead and its checkpoints, as the others are without theirs."""

    def __init__(self, family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> None:
        from training.run_state import RunState
        from training.runs import SaeRun, TrainerConfig

        config = TrainerConfig(
            architecture=ARCHITECTURES[family],
            options={"k": setting.k},
            d_sae=setting.d_sae,
            batch_tokens=setting.batch_tokens,
            lr=setting.lr,
            warmup_fraction=setting.warmup_steps / setting.steps,
            decay_fraction=setting.decay_steps / setting.steps,
            clip_norm=CLIP_NORM,
            dead_after_tokens=setting.dead_after_tokens,
            seed=setting.seed,
            autocast=setting.autocast,
            device=setting.device,
        )
        self.state = RunState(SaeRun(HOOK_NAME, config), {HOOK_NAME: sample}, steps=setting.steps)

    def step(self, batch: Float[Tensor, "batch d_in"]) -> None:
        """What `train_saes` does with a batch."""
        if self.state.advance({HOOK_NAME: batch}):
            self.state.settle()

    def export(self) -> SAE:
        """What it saves."""
        return self.state.export()


def create(family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """See `benchmarks.peers.Factory`."""
    return SailguardArm(family, setting, sample)

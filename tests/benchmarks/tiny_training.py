"""The training benchmark at a size that takes no time: rows, an arm that learns nothing, and how SAEs are evaluated."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import trainers
from benchmarks.peers import HOOK_NAME, Family, Setting
from feature_bank.sae import SAE

TINY = Setting(
    d_in=8, d_sae=24, k=3, batch_tokens=32, steps=40, lr=1e-2, warmup_steps=4, decay_steps=12, dead_after_tokens=640
)


def rows(n: int = 512, d_in: int = 8, *, seed: int = 0) -> Tensor:
    """Sparse sums of directions around a mean that is not zero, at a scale far from one."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, d_in, generator=torch.Generator().manual_seed(1))
    acts = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.12)
    return 7.0 * (acts @ directions) + 3.0


class RecordingArm:
    """Learns nothing and remembers what it was given."""

    def __init__(self, setting: Setting, quality: float = 1.0) -> None:
        self.setting, self.quality = setting, quality
        self.seen: list[Tensor] = []

    def step(self, batch: Tensor) -> None:
        self.seen.append(batch)

    def export(self) -> SAE:
        generator = torch.Generator().manual_seed(0)
        W_dec = torch.randn(self.setting.d_sae, self.setting.d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        return SAE(
            W_enc=self.quality * W_dec.T.contiguous(),
            W_dec=W_dec,
            b_enc=torch.zeros(self.setting.d_sae),
            b_dec=torch.full((self.setting.d_in,), 3.0),
            threshold=torch.ones(self.setting.d_sae),
            hook_name=HOOK_NAME,
        )


def evaluate(sae: SAE, family: Family, data: Tensor | None = None) -> trainers.Quality:
    data = rows(512, seed=9) if data is None else data
    return trainers.evaluate(sae, data, family=family, k=TINY.k, batch_tokens=64)

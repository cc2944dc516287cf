"""What one SAE of a training is: its hook point, architecture and settings, its name, its learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from feature_bank.errors import DataError

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
_CIRCUMSTANCES = ("device", "compile", "prefetch", "checkpoint_every", "checkpoint_seconds")
_SAFE_NAME = re.compile(r"[\w.,=+-]+(/[\w.,=+-]+)*")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How one SAE is trained."""

    architecture: str = "batch_topk"
    """A key of `training.architectures.ARCHITECTURES`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The architecture's own settings, such as k or l1; what is left out takes its default."""
    expansion: int = 8
    """d_sae over d_in, if `d_sae` is None."""
    d_sae: int | None = None
    batch_tokens: int = 2048
    epochs: int = 1
    """Passes over the activations."""
    lr: float = 1.2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = 0.05
    """Share of the steps, at the beginning, over which the learning rate rises linearly from zero."""
    decay_fraction: float = 0.3
    """Share of the steps, at the end, over which it falls to zero."""
    decay: Literal["linear", "cosine"] = "linear"
    clip_norm: float | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    dead_after_tokens: int = 100_000
    """A feature that did not fire for so many tokens is dead, until it does."""
    seed: int = 0
    """Of the weights at the start. The order of the data is the reader's."""
    autocast: bool | None = None
    """Whether products are computed in bfloat16; None: on a CUDA device that can. Weights are float32 in any case."""
    device: str | None = None
    """None: cuda if there is one, else mps, else cpu."""
    compile: bool = False
    """Whether torch.compile is put on the step."""
    prefetch: int | None = None
    """Batches read ahead in a thread; 0: no thread. None: 2."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints, so that fast steps do not wait for slow disks. 0: only the steps count."""

    def __post_init__(self) -> None:
        rules: dict[str, bool] = {
            "expansion": self.expansion >= 1,
            "d_sae": self.d_sae is None or self.d_sae >= 1,
            "batch_tokens": self.batch_tokens >= 1,
            "epochs": self.epochs >= 1,
            "lr": 0 < self.lr < math.inf,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "warmup_fraction": 0 <= self.warmup_fraction <= 1,
            "decay_fraction": 0 <= self.decay_fraction <= 1,
            "decay": self.decay in ("linear", "cosine"),
            "clip_norm": self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "dead_after_tokens": self.dead_after_tokens >= 1,
            "prefetch": self.prefetch is None or self.prefetch >= 0,
            "checkpoint_every": self.checkpoint_every >= 1,
            "checkpoint_seconds": self.checkpoint_seconds >= 0,
        }
        for name, holds in rules.items():
            if not holds:
                raise DataError(f"trainer setting {name!r}: {getattr(self, name)!r} is out of range")

    def meaning(self) -> dict[str, Any]:
        """The settings that decide which weights come out, as JSON."""
        return {name: value for name, value in asdict(self).items() if name not in _CIRCUMSTANCES}


@dataclass(frozen=True)
class SaeRun:
    """One SAE to be trained."""

    hook_name: str
    """What it reads."""
    config: TrainerConfig
    hook_name_out: str | None = None
    """What it predicts, for a transcoder; None: `hook_name`."""
    name: str = ""
    """Where it is kept below the output folder; made from the other fields if empty."""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.hook_name}/{label(self.config)}")
        if not _SAFE_NAME.fullmatch(self.name) or any(set(part) <= {"."} for part in self.name.split("/")):
            raise DataError(f"{self.name!r} cannot be the name of an SAE's folder; use letters, digits and . _ - = + ,")


def label(config: TrainerConfig, swept: Collection[str] = ()) -> str:
    """Architecture, the options that are numbers, what else was swept, and the seed: `batch_topk-k32-seed0`."""
    parts = [config.architecture]
    for name, value in config.options.items():
        if name in swept or (isinstance(value, int | float) and not isinstance(value, bool)):
            parts.append(f"{name}{_short(value)}")
    parts += [f"{name}{_short(getattr(config, name))}" for name in swept if name not in {*config.options, "seed"}]
    return "-".join([*parts, f"seed{config.seed}"])


def learning_rate(step: int, steps: int, config: TrainerConfig) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, constant, linear or cosine decay to zero."""
    warmup = max(1, round(steps * config.warmup_fraction))
    decay = max(1, round(steps * config.decay_fraction))
    left = min(1.0, (steps - step) / decay)
    if config.decay == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return config.lr * min(1.0, (step + 1) / warmup, left)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()

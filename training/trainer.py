"""The training loop of one SAE over cached activations: batches, optimiser, schedule, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_bank.atomic import atomic_folder
from feature_bank.errors import DataError
from feature_bank.sae import SAE
from training.architectures import BatchTopK, StepStats

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.safetensors"
OUTLIER_FACTOR = 8.0


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How one SAE is trained."""

    expansion: int = 8
    """d_sae over d_in."""
    k: int = 32
    """Mean number of active features a token."""
    batch_tokens: int = 2048
    epochs: int = 2
    """Passes over the cached activations."""
    lr: float = 1.2e-3
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    clip_norm: float = 1.0
    dead_after_tokens: int = 100_000
    checkpoint_every: int = 100
    """Steps between checkpoints; an interruption loses at most these."""
    seed: int = 0


def learning_rate(step: int, steps: int, config: TrainerConfig) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    warmup = max(1, round(steps * config.warmup_fraction))
    decay = max(1, round(steps * config.decay_fraction))
    return config.lr * min(1.0, (step + 1) / warmup, (steps - step) / decay)


def inliers(activations: Float[Tensor, "tokens d_in"]) -> Bool[Tensor, " tokens"]:
    """Which rows are not attention-sink outliers: those up to eight times the median length.

    A few positions carry activations a hundred times longer than all others; one of them in a batch would be its loss.
    Raises DataError for NaN or infinity.
    """
    length = torch.cat([part.float().norm(dim=1) for part in torch.split(activations, 65_536)])
    if not bool(torch.isfinite(length).all()):  # one NaN makes the median NaN, and no row would be left
        raise DataError("the activations hold NaN or infinity")
    return length <= OUTLIER_FACTOR * length.median()


def train_sae(
    activations: Float[Tensor, "tokens d_in"],
    hook_name: str,
    folder: Path,
    config: TrainerConfig,
    *,
    on_step: Callable[[int, int, StepStats], None] | None = None,
) -> tuple[SAE, StepStats]:
    """Train a BatchTopK SAE and return its JumpReLU form with the last steps' mean statistics.

    activations: any floating dtype, one row a token; may be memory-mapped. Checkpoints go to `folder`; a run that was
    stopped continues from the last one and ends with the same weights as an uninterrupted run.

    Raises DataError for activations that are not finite, too few rows, or a checkpoint of another configuration.
    """
    try:
        activations = activations[inliers(activations)]
    except DataError as e:
        raise DataError(f"{hook_name}: {e}; harvest again") from e
    tokens, d_in = activations.shape
    if tokens < config.batch_tokens:
        raise DataError(
            f"{tokens} activations at {hook_name} are fewer than one batch of {config.batch_tokens}; give more text"
        )
    steps_per_epoch = tokens // config.batch_tokens
    steps = steps_per_epoch * config.epochs
    sample = activations[:: max(1, tokens // 20_000)].float()
    sae = BatchTopK.create(
        sample,
        d_sae=config.expansion * d_in,
        k=config.k,
        dead_after_tokens=config.dead_after_tokens,
        seed=config.seed,
    )
    optimiser = torch.optim.Adam(list(sae.parameters().values()), lr=config.lr, betas=(0.9, 0.999), fused=True)
    fingerprint = {"config": asdict(config), "hook_name": hook_name, "tokens": tokens, "d_in": d_in}
    step, recent = _restore(folder, fingerprint, sae, optimiser)

    order, epoch = torch.empty(0, dtype=torch.long), -1
    while step < steps:
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            order = torch.randperm(tokens, generator=torch.Generator().manual_seed(config.seed * 1009 + epoch))
        start = (step % steps_per_epoch) * config.batch_tokens
        batch = activations[order[start : start + config.batch_tokens]].float()
        grads, stats = sae.gradients(batch)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))
        if not math.isfinite(norm):
            raise DataError(f"the gradient at {hook_name}, step {step}, is not finite; are all activations finite?")
        for name, parameter in sae.parameters().items():
            parameter.grad = grads[name] * min(1.0, config.clip_norm / (norm + 1e-12))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        optimiser.step()
        sae.renormalise()
        step += 1
        recent = [*recent[-49:], stats]
        if on_step is not None:
            on_step(step, steps, stats)
        if step % config.checkpoint_every == 0 or step == steps:
            _checkpoint(folder, fingerprint, sae, optimiser, step, recent)
    mean = StepStats(*(sum(values) / len(recent) for values in zip(*recent, strict=True)))
    return sae.export(hook_name), mean


def _checkpoint(
    folder: Path,
    fingerprint: dict[str, object],
    sae: BatchTopK,
    optimiser: torch.optim.Adam,
    step: int,
    recent: list[StepStats],
) -> None:
    tensors = {name: p.detach().clone().contiguous() for name, p in sae.parameters().items()}
    tensors["tokens_since_fired"] = sae.tokens_since_fired.clone()
    for name, parameter in sae.parameters().items():
        moments = optimiser.state[parameter]
        tensors[f"exp_avg.{name}"] = moments["exp_avg"].clone().contiguous()
        tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"].clone().contiguous()
    state = {
        "fingerprint": fingerprint,
        "step": step,
        "threshold": sae.threshold,
        "last_cut": sae._last_cut,
        "recent": [list(stats) for stats in recent],
    }
    with atomic_folder(folder) as tmp:
        save_file(tensors, tmp / TENSORS_FILE)
        (tmp / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def _restore(
    folder: Path, fingerprint: dict[str, object], sae: BatchTopK, optimiser: torch.optim.Adam
) -> tuple[int, list[StepStats]]:
    if not (folder / STATE_FILE).exists():
        return 0, []
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state["fingerprint"] != fingerprint:
        raise DataError(f"the checkpoint in {folder} belongs to another configuration; remove it or use another folder")
    tensors = load_file(folder / TENSORS_FILE)
    for name, parameter in sae.parameters().items():
        parameter.copy_(tensors[name])
        optimiser.state[parameter] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": tensors[f"exp_avg.{name}"].clone(memory_format=torch.preserve_format),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].clone(memory_format=torch.preserve_format),
        }
    sae.tokens_since_fired = tensors["tokens_since_fired"]
    sae.threshold, sae._last_cut = state["threshold"], state["last_cut"]
    return int(state["step"]), [StepStats(*stats) for stats in state["recent"]]

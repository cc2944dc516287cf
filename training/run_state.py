"""One SAE while it is being trained: a step of its optimiser, and its way into a checkpoint and out of it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils import get_total_norm

from feature_bank.errors import DataError
from feature_bank.sae import SAE
from training.architectures import ARCHITECTURES, Architecture, ArchitectureOptions, StepStats
from training.batches import Batch
from training.checkpoints import Checkpoint
from training.devices import Stopwatch, choose_autocast, choose_device, seed_generators
from training.replicas import ALONE, Replicas
from training.runs import SaeRun, learning_rate

RECENT = 50
"""Steps whose mean statistics stand for the trained SAE."""
_FUSED = ("cpu", "cuda", "mps")
_SETTLE_EVERY = 16  # steps that an accelerator may run ahead of the checks
logger = logging.getLogger(__name__)


class RunState:
    """The weights, optimiser and position of one run. `step` is the number of steps it has made.

    replicas: who trains it together; each has a RunState of its own, and all are equal to the bit after every step.
    """

    def __init__(self, run: SaeRun, sample: Batch, *, steps: int, replicas: Replicas = ALONE) -> None:
        """Initialise from a sample of the data. Raises DataError naming the option that is wrong."""
        config = run.config
        self.run = run
        self.steps = steps
        self.replicas = replicas
        self.step = 0
        self.device = choose_device(config.device)
        self.recent: deque[StepStats] = deque(maxlen=RECENT)
        self.autocast = choose_autocast(config.autocast, self.device)
        rows = sample[run.hook_name].to(self.device)
        architecture, options = resolve_options(run)
        self._sae: Architecture = architecture.create(
            rows,
            d_sae=config.d_sae or config.expansion * rows.shape[1],
            seed=config.seed,
            dead_after_tokens=config.dead_after_tokens,
            options=options,
            target_sample=sample[run.hook_name_out].to(self.device) if run.hook_name_out else None,
            hook_name_out=run.hook_name_out,
        )
        self._sae.replicas = replicas
        self._gradients = torch.compile(self._sae.gradients) if config.compile else self._sae.gradients
        self._parameters = self._sae.parameters()
        fused = self.device.type in _FUSED
        self._optimiser = torch.optim.Adam(
            list(self._parameters.values()),
            lr=config.lr,
            betas=config.betas,
            fused=fused or None,
            foreach=None if fused else True,
        )
        self._stopwatch = Stopwatch(self.device)
        self._seconds_before = 0.0
        self._unsettled: list[tuple[Tensor, StepStats]] = []
        self._settle_every = 1 if self.device.type == "cpu" else _SETTLE_EVERY

    def advance(self, batch: Mapping[str, Tensor]) -> bool:
        """Make one step on the rows on `device`: the batch, or this replica's part. Returns whether `settle` is due.

        Raises DataError if the gradient is not finite; the weights are then those of the step before.
        """
        config = self.run.config
        with self._stopwatch.running():
            target = batch[self.run.hook_name_out] if self.run.hook_name_out else None
            seed_generators(config.seed * 1_000_003 + self.step, self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                grads, stats = self._gradients(batch[self.run.hook_name], target, progress=self.step / self.steps)
            for name, parameter in self._parameters.items():
                grad = grads[name]
                if grad.stride() != parameter.stride():  # the fused kernel walks both as they lie in memory
                    grad = torch.empty_like(parameter).copy_(grad)
                parameter.grad = grad
            self.replicas.add_up(p.grad for p in self._parameters.values() if p.grad is not None)
            norm = get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
            if self._settle_every == 1:
                self._check(float(norm))
            self._clip(norm)
            self._optimiser.param_groups[0]["lr"] = learning_rate(self.step, self.steps, config)
            self._optimiser.step()
            self._sae.renormalise()
        self.step += 1
        self._unsettled.append((norm, stats))
        return len(self._unsettled) >= self._settle_every or self.step == self.steps

    def settle(self) -> list[StepStats]:
        """The figures of the steps since the last call. Raises DataError if one's gradient was not finite."""
        found = []
        first = self.step - len(self._unsettled)
        for step, (norm, stats) in enumerate(self._unsettled, first):
            self._check(float(norm), step)
            found.append(StepStats(*(float(value) for value in stats)))
        self._unsettled.clear()
        self.recent.extend(found)
        return found

    @property
    def figures(self) -> dict[str, float]:
        """Mean statistics of the last steps, and what the training took."""
        mean = StepStats(*(sum(values) / len(self.recent) for values in zip(*self.recent, strict=True)))
        seconds = self._seconds_before + self._stopwatch.settle()
        tokens = self.step * self.run.config.batch_tokens
        return {
            **mean._asdict(),
            "steps": self.step,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else math.inf,
        }

    def export(self) -> SAE:
        """The trained SAE, on the CPU."""
        return self._sae.export(self.run.hook_name)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on. `settle` first."""
        return Checkpoint(
            self.step,
            self._tensors(self._sae.buffers()),
            {
                "recent": [list(stats) for stats in self.recent],
                "seconds": self._seconds_before + self._stopwatch.settle(),
            },
        )

    def align(self) -> None:
        """Let all replicas have the state of the first one: it may come from a checkpoint that it alone has read."""
        if self.replicas.size == 1:
            return
        step = self.replicas.lead(lambda: self.step)
        same_step = self.replicas.least(self.step) == step
        if not self._optimiser.state:
            self._begin_moments(step)
        buffers = self._sae.buffers()
        differed = self.replicas.copy_first(self._tensors(buffers).values())
        self._sae.load_buffers(buffers)
        self.step = step
        if differed and same_step and step:
            logger.warning(
                "%s: the replicas' weights had come apart by step %d, and are those of the first again; their "
                "processors compute differently: use machines of one kind",
                self.run.name,
                step,
            )

    def restore(self, checkpoint: Checkpoint, source: str) -> None:
        """Go on from a checkpoint. Raises DataError, naming `source` and the field, if a tensor does not fit."""
        self._begin_moments(checkpoint.step)
        mine = self._tensors(self._sae.buffers())
        for name in sorted({*mine, *checkpoint.tensors}):
            expected, found = (
                f"{str(t[name].dtype).removeprefix('torch.')} {tuple(t[name].shape)}" if name in t else "none"
                for t in (mine, checkpoint.tensors)
            )
            if expected != found:
                raise DataError(f"{source}, field {name!r}: the checkpoint has {found}, this run {expected}")
        for name, parameter in self._parameters.items():
            parameter.copy_(checkpoint.tensors[name])
            moments = self._optimiser.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[moment].copy_(checkpoint.tensors[f"{moment}.{name}"])
        # Clones: a tensor read from a file may lie unaligned, and products of unaligned numbers can differ
        buffers = self._sae.buffers()
        self._sae.load_buffers(
            {name: checkpoint.tensors[f"buffer.{name}"].clone().to(b.device) for name, b in buffers.items()}
        )
        self.step = checkpoint.step
        self.recent.extend(StepStats(*stats) for stats in checkpoint.state["recent"])
        self._seconds_before = checkpoint.state["seconds"]

    def _begin_moments(self, step: int) -> None:
        """Give the optimiser the state that it would have made by itself at the first step."""
        for parameter in self._parameters.values():
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(step), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _tensors(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(self._parameters)
        for name, parameter in self._parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self._optimiser.state[parameter][moment]
        return tensors | {f"buffer.{name}": buffer for name, buffer in buffers.items()}

    def _check(self, norm: float, step: int | None = None) -> None:
        if math.isfinite(norm):
            return
        place = f"{self.run.name}, step {self.step if step is None else step}"
        bad = [name for name, p in self._parameters.items() if p.grad is None or not bool(p.grad.isfinite().all())]
        which = f"of {bad[0]} " if bad and step is None else ""
        raise DataError(
            f"{place}: the gradient {which}is not finite; lower 'lr' (it is {self.run.config.lr:g}), "
            "and see that the activations are whole"
        )

    def _clip(self, norm: Tensor) -> None:
        limit = self.run.config.clip_norm
        if limit is None:
            return
        if self._optimiser.defaults["fused"]:  # its kernel divides by grad_scale on the way, at no cost
            excess = (norm / limit).clamp(min=1.0)
            scale = None if self._settle_every == 1 and float(excess) == 1.0 else excess
            self._optimiser.grad_scale = scale  # type: ignore[attr-defined]  # read by step(), as GradScaler sets it
        else:
            grads = [p.grad for p in self._parameters.values() if p.grad is not None]
            torch._foreach_mul_(grads, (limit / norm).clamp(max=1.0))


def resolve_options(run: SaeRun) -> tuple[type[Architecture], ArchitectureOptions]:
    """The architecture's class and its validated options. Raises DataError naming the architecture or option."""
    config = run.config
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise DataError(f"{run.name}, field 'architecture': {config.architecture!r} is not one of {known}")
    try:
        return architecture, architecture.Options.model_validate(dict(config.options))
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, ("options", *first["loc"])))
        raise DataError(f"{run.name}, field {place!r}: {first['msg']}") from e

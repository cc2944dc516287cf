"""Training and quality figures as TensorBoard scalars, if the extra `tensorboard` is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from feature_bank.errors import MissingExtraError
from training.architectures import StepStats
from training.downstream import SaeQuality


class TensorBoardLog:
    """One folder of event files a run, so that TensorBoard lays the runs over each other.

    A training that is resumed at an earlier step replaces what was logged from there on.
    """

    def __init__(self, folder: Path, *, every: int = 10) -> None:
        """every: steps between scalars; the last step is always written. Raises MissingExtraError."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise MissingExtraError("event files need TensorBoard: pip install 'sailguard[tensorboard]'") from e
        self._folder, self._every, self._writer_class = folder, max(1, every), SummaryWriter
        self._writers: dict[str, Any] = {}

    def run(self, name: str) -> Callable[[int, int, StepStats], None]:
        """The `on_step(step, steps, stats)` of one run, whose folder is `name`."""
        return lambda step, steps, stats: self.log_step(name, step, steps, stats)

    def log_step(self, name: str, step: int, steps: int, stats: StepStats) -> None:
        """Write the figures of a step, with the number of steps made, as `train/fvu` and so on."""
        if step % self._every and step != steps:
            return
        writer = self._writer(name, step)
        for figure, value in stats._asdict().items():
            if math.isfinite(value):
                writer.add_scalar(f"train/{figure}", value, step)

    def log_quality(self, quality: SaeQuality, step: int, *, name: str | None = None) -> None:
        """Write all figures of an SAE as `quality/fvu` and so on. `name`: the run, else the SAE's own name."""
        writer = self._writer(name or quality.name, step)
        for figure, value in quality.to_dict().items():
            if isinstance(value, float):
                writer.add_scalar(f"quality/{figure}", value, step)

    def _writer(self, name: str, step: int) -> Any:
        if name not in self._writers:
            earlier = step if (self._folder / name).exists() else None
            self._writers[name] = self._writer_class(str(self._folder / name), purge_step=earlier)
        return self._writers[name]

    def close(self) -> None:
        """Write what is still in memory and close the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

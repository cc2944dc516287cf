"""What the tests of the cluster share, importable on its workers: a model and a reader that take their time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from torch import Tensor

from feature_bank.errors import DataError
from tests.training import samples
from tests.training.samples import TOY_HOOKS, toy_harvest, toy_sequences
from training.cache import Harvest
from training.reader import ActivationReader
from training.runs import SaeRun, TrainerConfig
from training.spreading import Work

RAY = [pytest.mark.ray, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]  # its own, not ours
SEQUENCES = 60
PAUSE = 0.25
BATCH = 32


class LlamaForCausalLM(samples.LlamaForCausalLM):
    """The toy model, slow enough that something can happen while it computes."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        time.sleep(PAUSE)
        return super().forward(input_ids, attention_mask, use_cache)


class SlowReader(ActivationReader):
    """A reader that pauses at every batch."""

    pause = 0.0

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Tensor]]:
        for batch in super().batches(start_step):
            time.sleep(self.pause)
            yield batch


class UnseenReader(SlowReader):
    """A reader whose cache lies where no worker looks."""

    files = (Path("not-shared/shard-00000.safetensors"),)


def toy(folder: Path, **options: Any) -> Harvest:
    """A harvest in a dozen shards or more, one batch each."""
    return toy_harvest(folder, sequences=toy_sequences(SEQUENCES), shard_tokens=40, **options)


def reader(cache: Harvest, pause: float = 0.0) -> SlowReader:
    found = SlowReader(cache, TOY_HOOKS, batch_tokens=BATCH, seed=1)
    found.pause = pause
    return found


def saes(epochs: int = 1) -> list[SaeRun]:
    """Two at each hook point, one of them larger; checkpoints at every fifth step."""
    settings: dict[str, Any] = {
        "options": {"k": 2},
        "batch_tokens": BATCH,
        "epochs": epochs,
        "checkpoint_every": 5,
        "checkpoint_seconds": 0.0,
    }
    return [
        SaeRun(hook, TrainerConfig(expansion=expansion, **settings), name=f"{hook}/x{expansion}")
        for hook in TOY_HOOKS
        for expansion in (2, 3)
    ]


@dataclass(frozen=True, kw_only=True)
class Slowly(Work[int, list[int]]):
    """Squares numbers, slowly, and writes down each time that it does."""

    results = TypeAdapter(list[int])
    folder: Path
    bad: int | None = None
    deadly: int | None = None

    def do(self, part: int) -> list[int]:
        if part == self.bad:
            raise DataError(f"part {part} cannot be done")
        if part == self.deadly:
            os._exit(1)
        time.sleep(PAUSE)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"done-{part}-", delete=False):
            return [part, part * part]

    def marks(self) -> list[Any]:
        return []

    def done(self) -> list[str]:
        """What was done, as often as it was."""
        return sorted(path.name for path in self.folder.glob("done-*"))

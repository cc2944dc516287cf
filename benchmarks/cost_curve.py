"""How the costs of a bank grow with its corpus: the stages that read all of it, over 1, 4 and 16 times a text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.corpus import TokenSequence
from training.harvest import harvest
from training.pipeline import load_preset
from training.reader import ActivationReader
from training.runs import SaeRun, TrainerConfig
from training.trainer import train_saes

FACTORS = (1, 4, 16)


class Cost(NamedTuple):
    """What a corpus of so many tokens cost."""

    tokens: int
    harvest_seconds: float
    train_seconds: float
    """Of one SAE at each hook point, one pass."""
    bytes: int
    """Of the activations, on disk."""


def cost_curve(
    model: Any,
    sequences: Sequence[TokenSequence],
    runs: Sequence[SaeRun],
    scratch: Path,
    report: Callable[[str], None] = print,
) -> list[Cost]:
    """The costs of a sixteenth, a quarter and the whole of the sequences, as one process has them."""
    _cost(model, sequences[: max(1, len(sequences) // FACTORS[-1])], runs, scratch)  # the first of anything is slower
    found = []
    for factor in FACTORS:
        part = sequences[: max(1, len(sequences) * factor // FACTORS[-1])]
        found.append(_cost(model, part, runs, scratch))
        report(f"{factor}x: {found[-1]}")
    return found


def preset_runs(name: str = "smollm2-135m") -> list[SaeRun]:
    """The SAEs of a preset."""
    preset = load_preset(name)
    settings = preset.sae.model_dump()
    config = TrainerConfig(options={"k": settings.pop("k")}, **settings)
    return [SaeRun(hook_name, config, name=hook_name) for hook_name in preset.hook_points]


def _cost(model: Any, sequences: Sequence[TokenSequence], runs: Sequence[SaeRun], scratch: Path) -> Cost:
    hook_names = [run.hook_name for run in runs]
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        started = time.perf_counter()
        cache = harvest(model, sequences, hook_names, folder / "cache", fingerprint={"model": "embedded"})
        harvested = time.perf_counter()
        reader = ActivationReader(cache, hook_names, batch_tokens=runs[0].config.batch_tokens, seed=0)
        train_saes(reader, runs, folder / "work")
        return Cost(
            tokens=cache.tokens,
            harvest_seconds=harvested - started,
            train_seconds=time.perf_counter() - harvested,
            bytes=sum(path.stat().st_size for path in (folder / "cache").iterdir()),
        )

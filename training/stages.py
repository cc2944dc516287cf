"""Who does the heavy stages: this process, or a cluster.

Both keep the signatures of the functions that do the work here, and give the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.cache import Harvest
from training.harvest import harvest
from training.simulation.llm_run import LlmRun, run
from training.spreading import Spread, here
from training.trainer import TrainedSae, train_saes


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The functions to call for the heavy stages."""

    harvest: Callable[..., Harvest] = harvest
    train_saes: Callable[..., list[TrainedSae]] = train_saes
    spread: Spread = here
    """Ablates, explains and scores features, a few at a time."""
    explain: Callable[..., LlmRun] = run
    """Has a language model explain features."""


HERE = Stages()
"""All in this process."""

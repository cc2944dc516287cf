"""Features a few at a time: the parts in which they are explained and scored, whoever does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.selected import FeatureKey, feature_id

TOGETHER = 16
"""Features of a part: a second or two of work, and what all features share weighs little beside it."""
Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Some of the features, and what they do."""

    first: int
    """The place of the first among all."""
    keys: tuple[FeatureKey, ...]
    acts: npt.NDArray[np.float16]
    """(tokens, n) normalised activations of the whole harvest."""


@dataclass(frozen=True)
class Parted:
    """All features, in parts."""

    acts: npt.NDArray[np.float16]
    """(tokens, F)"""
    keys: Sequence[FeatureKey]

    def __len__(self) -> int:
        return -(-len(self.keys) // TOGETHER)

    def __getitem__(self, number: int) -> Columns:
        """A part, with a copy of its activations."""
        here = slice(number * TOGETHER, (number + 1) * TOGETHER)
        return Columns(first=here.start, keys=tuple(self.keys[here]), acts=np.ascontiguousarray(self.acts[:, here]))

    def counted(self, report: Report | None, stage: str) -> Callable[[int], None] | None:
        """What reports, told of each part that is done, how many features are."""
        if report is None:
            return None
        done = 0

        def say(number: int) -> None:
            nonlocal done
            keys = self.keys[number * TOGETHER : (number + 1) * TOGETHER]
            done += len(keys)
            report(stage, done, len(self.keys), feature_id(keys[-1]))

        return say

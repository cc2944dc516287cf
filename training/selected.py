"""What the last stages hand on: trained hook points, and the features that were selected from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_bank.sae import SAE
from guard.hook_points import parse_hook_name

FeatureKey = tuple[str, int]
"""(hook_name, index in the dictionary)"""


def feature_id(key: FeatureKey) -> str:
    """`L14/2031`"""
    return f"L{parse_hook_name(key[0]).layer}/{key[1]}"


@dataclass(frozen=True, kw_only=True)
class TrainedHook:
    """A trained SAE and its quality."""

    sae: SAE
    sha256: str
    k: int
    fvu: float
    l0: float
    dead_fraction: float


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The bank's features in order, their activations on every token, and where each hook point's begin."""

    keys: list[FeatureKey]
    acts: npt.NDArray[np.float16]
    """(tokens, F), normalised."""

    def subset(self, keys: Sequence[FeatureKey]) -> Selection:
        """Some of the features, in the order given."""
        position = self.position()
        return Selection(keys=list(keys), acts=self.acts[:, [position[key] for key in keys]])

    def position(self) -> dict[FeatureKey, int]:
        """Where each feature stands in the bank's order."""
        return {key: i for i, key in enumerate(self.keys)}

"""What the last stages hand on: trained hook points, and the features that were selected from them."""

from __future__ import annotations

import hashlib
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
    """A trained SAE and its quality; the last of its rows may be directions that were fitted to labels."""

    sae: SAE
    sha256: str
    """Of the SAE as it was trained, without directions."""
    k: int
    fvu: float
    l0: float
    dead_fraction: float
    directions: tuple[str, ...] = ()
    """What each of the last rows is the direction of: a domain, or `DOMAIN/CONCEPT`."""

    @property
    def learnt(self) -> int:
        """How many of the rows, from the first on, are the SAE's own."""
        return self.sae.d_sae - len(self.directions)

    def direction(self, index: int) -> str:
        """What the row is the direction of; empty for one of the SAE's own."""
        return self.directions[index - self.learnt] if index >= self.learnt else ""

    @property
    def digest(self) -> str:
        """sha256 of the rows' encoder side, directions included: what activations depend on."""
        parts = (self.sae.W_enc, self.sae.b_enc, self.sae.threshold, self.sae.b_dec)
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


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

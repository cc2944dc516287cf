"""Trainers side by side: one adapter a library, each driving that library's own training step on given batches.

An arm is one library training one kind of SAE. All of a comparison get the same batches in the same order, the same
learning rate and schedule, a global gradient norm of at most one, and the same limit after which a feature is dead.
What a library does besides (its initialisation, its normaliser, its form of Adam) stays as that library has it; each
adapter's docstring says what was chosen where the library offers a choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import SailguardError
from feature_bank.sae import SAE

Family = Literal["topk", "batchtopk"]
REQUIREMENTS = "benchmarks/requirements-peers.txt"
HOOK_NAME = "blocks.14.hook_resid_post"  # half the depth of the embedded model
CLIP_NORM = 1.0  # sae-lens and dictionary_learning have it fixed in their steps
AUX_COEFFICIENT = 1 / 32  # of the auxiliary loss over the main one (Gao et al., 2024)


class PeerMissingError(SailguardError):
    """A library that is to be compared is not installed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every arm of a comparison."""

    d_in: int
    d_sae: int
    k: int
    """Active features a token, for BatchTopK on average over a batch."""
    batch_tokens: int
    steps: int
    """Length of the schedule."""
    lr: float
    warmup_steps: int
    decay_steps: int
    """Steps at the end over which the rate falls linearly to zero."""
    dead_after_tokens: int
    seed: int = 0
    device: str = "cpu"
    autocast: bool = False
    """Products in bfloat16."""

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0), over `lr`."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps), (self.steps - step) / max(1, self.decay_steps))


class Arm(Protocol):
    """One library training one SAE."""

    def step(self, batch: Float[Tensor, "batch d_in"]) -> None:
        """One whole training step on raw activations (float32, on the arm's device)."""

    def export(self) -> SAE:
        """What was learnt, in raw activations' units, all normalisation folded in, on the CPU.

        `threshold` is the library's own for BatchTopK, zeros for TopK (its k largest are kept besides). May end the
        training: no step may follow.
        """


class Factory(Protocol):
    """Makes an arm; the modules of this package have one or two."""

    def __call__(self, family: Family, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
        """sample: rows from all over the data, for what a library estimates before it starts."""


ARMS: dict[str, tuple[str, str, Family]] = {
    "sailguard_topk": ("sailguard", "create", "topk"),
    "sailguard_batchtopk": ("sailguard", "create", "batchtopk"),
    "sae_lens_topk": ("sae_lens", "create", "topk"),
    "sae_lens_sparse_topk": ("sae_lens", "create_sparse", "topk"),
    "sae_lens_batchtopk": ("sae_lens", "create", "batchtopk"),
    "dictionary_learning_topk": ("dictionary_learning", "create", "topk"),
    "dictionary_learning_batchtopk": ("dictionary_learning", "create", "batchtopk"),
    "sparsify_topk": ("sparsify", "create", "topk"),
}
"""Arm -> (module of this package, its factory, kind of SAE)."""
PACKAGES = {"sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}
"""Module of this package -> the distribution it drives."""


def create(arm: str, setting: Setting, sample: Float[Tensor, "n d_in"]) -> Arm:
    """The arm `arm`, ready for its first step. Raises PeerMissingError if its library is not installed."""
    name, function, family = ARMS[arm]
    factory: Factory = getattr(import_module(f"{__name__}.{name}"), function)
    try:
        return factory(family, setting, sample)
    except ModuleNotFoundError as e:
        raise PeerMissingError(
            f"{arm}: {PACKAGES.get(name, name)} cannot be imported ({e}); "
            f"pip install --no-deps -r {REQUIREMENTS}, or leave it out with --peers"
        ) from e

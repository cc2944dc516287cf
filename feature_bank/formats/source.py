"""What a format reads and what comes out of it: the caller's options, and the SAE with where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from feature_bank.errors import BankError
from feature_bank.sae import SAE

__all__ = ["Format", "LoadedSAE", "SourceOptions"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a file may leave open, from the one who has it. What is given wins over what the file says."""

    hook_name: str | None = None
    """The hook point that is read, such as `blocks.12.hook_resid_post`."""
    hook_name_out: str | None = None
    """The hook point that a transcoder predicts."""
    model_name: str | None = None
    """The language model."""
    k: int | None = None
    """How many features fire per token, where the file does not say."""
    index: int | None = None
    """Which SAE of a file that stacks several."""
    norm_factor: float | None = None
    """The number by which activations were multiplied in training, where the file tells that they were but not by
    how much."""


@dataclass(frozen=True, kw_only=True)
class LoadedSAE:
    """An SAE, and what its files say besides the weights."""

    sae: SAE
    format: str
    weights: Path
    """The file that the weights were read from."""
    model_name: str | None = None
    notes: tuple[str, ...] = ()
    """What was changed or assumed on the way, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One file format: how it is recognised and read."""

    name: str
    matches: Callable[[Path], bool]
    """Whether a file or folder is named as this format names them. Nothing is opened."""
    read: Callable[[Path, SourceOptions], LoadedSAE]
    options: frozenset[str] = frozenset()
    """Of the options, those that only some formats take: `k`, `index`, `norm_factor`, `hook_name_out`."""

    def load(self, path: Path, options: SourceOptions) -> LoadedSAE:
        """Read `path`. Raises BankError naming file and field, also for an option that this format has no use for."""
        for field in fields(options):
            universal = field.name in ("hook_name", "model_name")
            if not universal and field.name not in self.options and getattr(options, field.name) is not None:
                raise BankError(f"the format {self.name} has no use for it", file=str(path), field=field.name)
        return self.read(path, options)

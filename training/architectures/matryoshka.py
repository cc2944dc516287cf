"""Matryoshka BatchTopK: every prefix of the dictionary reconstructs on its own, so that general features come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from feature_bank.errors import DataError
from training.architectures.base import ArchitectureOptions
from training.architectures.batch_topk import BatchTopK
from training.architectures.sparse import SparseOptions
from training.kernels import SparseActs, SparseGrads, sparse_backward, sparse_decode


class MatryoshkaOptions(SparseOptions):
    """What the Matryoshka SAE lets its user choose."""

    group_sizes: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Features that each prefix adds to the one before, summing to d_sae; 1/16, 1/16, 1/8, 1/4, 1/2 if not given."""


@dataclass(kw_only=True, eq=False)
class MatryoshkaBatchTopK(BatchTopK):
    """Matryoshka SAE (Bussmann et al., 2025) with the BatchTopK activation.

    The squared error of the loss is the mean over the prefixes of the dictionary; `fvu` is the whole dictionary's.
    """

    name: ClassVar[str] = "matryoshka_batch_topk"
    Options: ClassVar[type[ArchitectureOptions]] = MatryoshkaOptions

    options: MatryoshkaOptions

    @classmethod
    def _checked(cls, options: ArchitectureOptions | None, d_sae: int) -> Any:
        chosen = super()._checked(options, d_sae)
        sizes = chosen.group_sizes
        if sizes is not None and (min(sizes) < 1 or sum(sizes) != d_sae):
            raise DataError(
                f"option 'group_sizes' of {cls.name!r} is {sizes}; positive sizes that sum to d_sae {d_sae} are needed"
            )
        return chosen

    @property
    def group_ends(self) -> list[int]:
        """Width of each prefix; the last one is d_sae."""
        if self.options.group_sizes is None:
            return sorted({max(1, self.d_sae >> shift) for shift in range(5)})
        return torch.tensor(self.options.group_sizes).cumsum(0).tolist()

    def _reconstruct(
        self, acts: SparseActs, sae_in: Tensor, wanted: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, SparseGrads]:
        ends = self.group_ends
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        groups = [acts.features(first, end) for first, end in bounds]
        errors, error = [], -wanted
        for group, (first, end) in zip(groups, bounds, strict=True):
            error = error + sparse_decode(group, self.W_dec[first:end])
            errors.append(error)
        grad_out = torch.zeros_like(error)
        found = []
        for group, (first, end), partial in zip(groups[::-1], bounds[::-1], errors[::-1], strict=True):
            # A group takes part in its own prefix and in every wider one
            grad_out = grad_out + partial * (scale / len(ends))
            found.append(sparse_backward(group, sae_in, grad_out, self.W_dec[first:end]))
        return error, grad_out, SparseGrads(*(torch.cat(parts[::-1]) for parts in zip(*found, strict=True)))

"""The active features of a batch, and the products with them: decode, and the gradients of decode and encode.

The gradients are written out by hand and checked against autograd in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SparseActs(NamedTuple):
    """The active features of a batch, in row-major order."""

    rows: Int[Tensor, " nnz"]
    cols: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    shape: tuple[int, int]
    """(batch, d_sae)"""

    def row_starts(self) -> Int[Tensor, " batch_plus_1"]:
        """Where each row's entries begin; the last element is their number."""
        return torch.searchsorted(self.rows, torch.arange(self.shape[0] + 1, device=self.rows.device))

    def by_feature(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " d_sae_plus_1"]]:
        """The order that sorts the entries by feature, rows ascending, and where each feature's entries begin."""
        if self.cols.device.type == "cpu" and self.shape[1] <= 2**16:
            # numpy sorts 16-bit integers by radix: several times faster than a comparison sort
            order = torch.from_numpy(np.argsort(self.cols.numpy().astype(np.uint16), kind="stable"))
        else:
            order = torch.argsort(self.cols, stable=True)
        starts = torch.zeros(self.shape[1] + 1, dtype=torch.long, device=self.cols.device)
        torch.cumsum(self.counts(), 0, out=starts[1:])
        return order, starts

    def counts(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each feature is active."""
        return torch.bincount(self.cols, minlength=self.shape[1])

    def where(self, keep: Bool[Tensor, " nnz"]) -> SparseActs:
        """The entries that `keep` marks."""
        return SparseActs(self.rows[keep], self.cols[keep], self.values[keep], self.shape)

    def features(self, first: int, end: int) -> SparseActs:
        """The columns `first` to `end` as a matrix of their own."""
        part = self.where((self.cols >= first) & (self.cols < end))
        return part._replace(cols=part.cols - first, shape=(self.shape[0], end - first))

    def to_dense(self) -> Float[Tensor, "batch d_sae"]:
        """As a dense matrix, zero where nothing is active."""
        dense = self.values.new_zeros(self.shape)
        dense[self.rows, self.cols] = self.values
        return dense

    @classmethod
    def stack(cls, parts: Sequence[SparseActs]) -> SparseActs:
        """The parts' rows below each other."""
        if len(parts) == 1:
            return parts[0]
        firsts = np.cumsum([0, *(part.shape[0] for part in parts)]).tolist()
        return cls(
            rows=torch.cat([part.rows + first for part, first in zip(parts, firsts, strict=False)]),
            cols=torch.cat([part.cols for part in parts]),
            values=torch.cat([part.values for part in parts]),
            shape=(firsts[-1], parts[0].shape[1]),
        )


class SparseGrads(NamedTuple):
    """Gradients of a loss through decode and encode, given its gradient at the reconstruction."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_enc: Float[Tensor, " d_sae"]
    radial: Float[Tensor, " d_sae"]
    """The product of each row of W_dec with its gradient, which falls out of the rest without another pass."""
    acts: Float[Tensor, " nnz"]


def sparse_decode(acts: SparseActs, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """acts @ W_dec."""
    bags, _ = _products(W_dec.device)
    return bags(acts.cols, acts.values, acts.row_starts(), W_dec)


def sparse_backward(
    acts: SparseActs,
    sae_in: Float[Tensor, "batch d_in"],
    grad_out: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "d_sae d_out"],
) -> SparseGrads:
    """Back-propagate `grad_out` (at the reconstruction) to the weights; `sae_in` is what the encoder multiplied."""
    bags, sampled = _products(W_dec.device)
    grad_acts = sampled(acts.rows, acts.cols, acts.row_starts(), grad_out, W_dec)
    order, starts = acts.by_feature()
    rows = acts.rows[order]
    zeros = grad_acts.new_zeros(acts.shape[1])
    return SparseGrads(
        W_enc_T=bags(rows, grad_acts[order], starts, sae_in),
        W_dec=bags(rows, acts.values[order], starts, grad_out),
        b_enc=zeros.index_add(0, acts.cols, grad_acts),
        radial=zeros.index_add(0, acts.cols, grad_acts * acts.values),
        acts=grad_acts,
    )


Bags = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Sampled = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _products(device: torch.device) -> tuple[Bags, Sampled]:
    """The two primitives that everything above is made of, in the form that is fastest on the device."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from training.kernels import triton

        return triton.weighted_bags, triton.sampled_products
    return weighted_bags, sampled_products


def weighted_bags(
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    starts: Int[Tensor, " bags_plus_1"],
    matrix: Float[Tensor, "n width"],
) -> Float[Tensor, "bags width"]:
    """out[b] = sum over the entries i of bag b of weights[i] * matrix[indices[i]]."""
    return torch.nn.functional.embedding_bag(
        indices, matrix, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def sampled_products(
    rows: Int[Tensor, " nnz"],
    cols: Int[Tensor, " nnz"],
    starts: Int[Tensor, " batch_plus_1"],
    left: Float[Tensor, "batch width"],
    right: Float[Tensor, "d_sae width"],
) -> Float[Tensor, " nnz"]:
    """out[i] = left[rows[i]] . right[cols[i]]: left @ right.T where it is wanted."""
    # The gradient of weighted_bags at its weights; calling it through autograd would compute the bags once more
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(left, right, cols, starts, rows, 0)
    return found

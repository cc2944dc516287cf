"""Sparse arithmetic of the top-k family on CPU: threshold search, decode, and the gradients, without dense products.

With `k` of `d_sae` features active, a dense step spends five products of size batch x d_in x d_sae; here only the
encoder's forward pass is dense. The gradients are written out by hand and checked against autograd in the tests.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SparseActs(NamedTuple):
    """The active features of a batch, in row-major order."""

    rows: Int[Tensor, " nnz"]
    cols: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    shape: tuple[int, int]

    def csr(self, values: Tensor | None = None) -> Tensor:
        """As a torch CSR matrix (batch, d_sae), with other values if given."""
        counts = torch.bincount(self.rows, minlength=self.shape[0])
        crow = torch.zeros(self.shape[0] + 1, dtype=torch.long, device=self.rows.device)
        torch.cumsum(counts, 0, out=crow[1:])
        return _csr(crow, self.cols, self.values if values is None else values, self.shape)

    def csr_transposed(self, values: Tensor | None = None) -> Tensor:
        """As a torch CSR matrix (d_sae, batch)."""
        order = torch.argsort(self.cols, stable=True)
        counts = torch.bincount(self.cols, minlength=self.shape[1])
        crow = torch.zeros(self.shape[1] + 1, dtype=torch.long, device=self.cols.device)
        torch.cumsum(counts, 0, out=crow[1:])
        data = self.values if values is None else values
        return _csr(crow, self.rows[order], data[order], (self.shape[1], self.shape[0]))


def _csr(crow: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch calls the format beta, once a process; two products are all that is used
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(crow, cols, values, shape, check_invariants=False)


def batch_topk_threshold(pre: Float[Tensor, "batch d_sae"], k: int, *, guess: float = 0.0) -> float:
    """The value that keeps exactly `k * batch` positive pre-activations (ties aside), found without sorting the batch.

    `guess` is a lower bound worth trying (the previous step's threshold, relaxed): only values above it are ranked.
    Returns 0.0 if fewer than `k * batch` values are positive.
    """
    wanted = k * pre.shape[0]
    for floor in (max(guess, 0.0), max(guess, 0.0) * 0.5, 0.0):
        candidates = pre[pre > floor]
        if candidates.numel() >= wanted:
            return float(candidates.kthvalue(candidates.numel() - wanted + 1).values)
        if floor == 0.0:
            break
    return 0.0


def keep_above(pre: Float[Tensor, "batch d_sae"], threshold: float) -> SparseActs:
    """The positive entries of `pre` that are at least `threshold`."""
    flat = pre.flatten()
    keep = torch.nonzero((flat >= threshold) & (flat > 0)).squeeze(1)
    return SparseActs(
        rows=keep // pre.shape[1],
        cols=keep % pre.shape[1],
        values=flat[keep],
        shape=(pre.shape[0], pre.shape[1]),
    )


def sparse_decode(acts: SparseActs, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
    """acts @ W_dec."""
    return acts.csr() @ W_dec


class SparseGrads(NamedTuple):
    """Gradients of a loss through decode and encode, given its gradient at the reconstruction."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    acts: Float[Tensor, " nnz"]


def sparse_backward(
    acts: SparseActs,
    centred: Float[Tensor, "batch d_in"],
    grad_out: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
) -> SparseGrads:
    """Back-propagate `grad_out` (at the reconstruction) to the weights; `centred` is the encoder's input x - b_dec."""
    # One dense product and a gather beat gathering two rows of d_in for every active feature
    grad_acts = (grad_out @ W_dec.T).flatten()[acts.rows * acts.shape[1] + acts.cols]
    return SparseGrads(
        W_enc=(acts.csr_transposed(grad_acts) @ centred).T,
        W_dec=acts.csr_transposed() @ grad_out,
        b_enc=torch.zeros(acts.shape[1], dtype=grad_acts.dtype).index_add_(0, acts.cols, grad_acts),
        acts=grad_acts,
    )

"""The two sparse primitives as Triton kernels. Imported only where CUDA and Triton are present."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]
def _bags_kernel(indices, weights, starts, matrix, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first = tl.load(starts + bag)
    end = tl.load(starts + bag + 1)
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    for i in range(first, end):
        row = tl.load(indices + i)
        total += tl.load(weights + i) * tl.load(matrix + row * width + column, mask=inside, other=0.0)
    tl.store(out + bag * width + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _sampled_kernel(cols, starts, left, right, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    mine = tl.load(left + row * width + column, mask=inside, other=0.0)
    first = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for i in range(first, end):
        other = tl.load(right + tl.load(cols + i) * width + column, mask=inside, other=0.0)
        tl.store(out + i, tl.sum(mine * other, axis=0))


def weighted_bags(
    indices: Int[Tensor, " nnz"],
    weights: Float[Tensor, " nnz"],
    starts: Int[Tensor, " bags_plus_1"],
    matrix: Float[Tensor, "n width"],
) -> Float[Tensor, "bags width"]:
    """As `training.kernels.sparse.weighted_bags`."""
    bags, width = starts.numel() - 1, matrix.shape[1]
    out = torch.empty(bags, width, dtype=matrix.dtype, device=matrix.device)
    grid = (bags, triton.cdiv(width, _BLOCK))
    _bags_kernel[grid](indices, weights.contiguous(), starts, matrix.contiguous(), out, width, BLOCK=_BLOCK)
    return out


def sampled_products(
    rows: Int[Tensor, " nnz"],  # noqa: ARG001  # the other form needs them
    cols: Int[Tensor, " nnz"],
    starts: Int[Tensor, " batch_plus_1"],
    left: Float[Tensor, "batch width"],
    right: Float[Tensor, "d_sae width"],
) -> Float[Tensor, " nnz"]:
    """As `training.kernels.sparse.sampled_products`; a whole row is held in registers, so width up to some 16,000."""
    width = left.shape[1]
    out = torch.empty(cols.numel(), dtype=left.dtype, device=left.device)
    block = triton.next_power_of_2(width)
    _sampled_kernel[(left.shape[0],)](cols, starts, left.contiguous(), right.contiguous(), out, width, BLOCK=block)
    return out

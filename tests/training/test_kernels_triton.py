"""The Triton kernels compute what the others compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.kernels import SparseActs, batch_topk, sparse_backward, sparse_decode, topk_rows
from training.kernels import sparse as portable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

BATCH, D_IN, D_SAE, K = 64, 200, 1000, 8


def to_cuda(acts: SparseActs) -> SparseActs:
    return SparseActs(acts.rows.cuda(), acts.cols.cuda(), acts.values.cuda(), acts.shape)


@pytest.fixture
def acts() -> SparseActs:
    pre = torch.randn(BATCH, D_SAE, generator=torch.Generator().manual_seed(0))
    pre[3] = -1.0
    return topk_rows(pre, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [D_IN, 512, 1100])
def test_both_primitives_equal_the_portable_ones(acts: SparseActs, dtype: torch.dtype, width: int) -> None:
    pytest.importorskip("triton")
    from training.kernels import triton

    left, right = torch.randn(BATCH, width, dtype=dtype), torch.randn(D_SAE, width, dtype=dtype)
    starts, values = acts.row_starts(), acts.values.to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    bags = triton.weighted_bags(acts.cols.cuda(), values.cuda(), starts.cuda(), right.cuda())
    expected = portable.weighted_bags(acts.cols, values, starts, right)
    torch.testing.assert_close(bags.cpu(), expected, **tolerance)
    dots = triton.sampled_products(acts.rows.cuda(), acts.cols.cuda(), starts.cuda(), left.cuda(), right.cuda())
    expected = portable.sampled_products(acts.rows, acts.cols, starts, left, right)
    torch.testing.assert_close(dots.cpu(), expected, **tolerance)


def test_decode_and_backward_are_the_same_on_both_devices(acts: SparseActs) -> None:
    generator = torch.Generator().manual_seed(1)
    sae_in, grad_out = (torch.randn(BATCH, D_IN, generator=generator) for _ in range(2))
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    torch.testing.assert_close(
        sparse_decode(to_cuda(acts), W_dec.cuda()).cpu(), sparse_decode(acts, W_dec), rtol=1e-4, atol=1e-4
    )
    expected = sparse_backward(acts, sae_in, grad_out, W_dec)
    for found, wanted in zip(
        sparse_backward(to_cuda(acts), sae_in.cuda(), grad_out.cuda(), W_dec.cuda()), expected, strict=True
    ):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_the_selection_is_the_same_on_both_devices() -> None:
    pre = torch.randn(BATCH, D_SAE, generator=torch.Generator().manual_seed(2))
    pairs: list[tuple[Tensor, Tensor]] = [
        (topk_rows(pre, K).to_dense(), topk_rows(pre.cuda(), K).to_dense()),
        (batch_topk(lambda: [pre], K, BATCH)[0].to_dense(), batch_topk(lambda: [pre.cuda()], K, BATCH)[0].to_dense()),
    ]
    for on_cpu, on_cuda in pairs:
        assert torch.equal(on_cpu, on_cuda.cpu())

"""The sparse arithmetic equals the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from training.kernels import SparseActs, batch_topk_threshold, keep_above, sparse_backward, sparse_decode, topk_rows

BATCH, D_IN, D_OUT, D_SAE, K = 12, 8, 6, 40, 3


class Reconstruction(torch.autograd.Function):
    """decode(keep(encode(x))) + b_dec with the kernels' gradients, so that gradcheck can judge them."""

    @staticmethod
    def forward(
        ctx: Any, sae_in: Tensor, W_enc_T: Tensor, b_enc: Tensor, W_dec: Tensor, rows: Tensor, cols: Tensor
    ) -> Tensor:
        pre = torch.addmm(b_enc, sae_in, W_enc_T.T)
        ctx.acts = SparseActs(rows, cols, pre[rows, cols], (sae_in.shape[0], W_dec.shape[0]))
        ctx.save_for_backward(sae_in, W_dec)
        return sparse_decode(ctx.acts, W_dec)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        sae_in, W_dec = ctx.saved_tensors
        grads = sparse_backward(ctx.acts, sae_in, grad_out.contiguous(), W_dec)
        return None, grads.W_enc_T, grads.b_enc, grads.W_dec, None, None


def some_acts(dtype: torch.dtype = torch.float32) -> SparseActs:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(BATCH, D_SAE, generator=generator, dtype=dtype)
    pre[3] = -1.0  # a row, and a column, without an entry
    pre[:, 5] = -1.0
    return keep_above(pre, batch_topk_threshold(pre, K))


def test_gradcheck_accepts_the_sparse_gradients() -> None:
    acts = some_acts(torch.float64)
    generator = torch.Generator().manual_seed(1)
    sae_in, W_enc_T, b_enc, W_dec = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_SAE, D_OUT))
    )
    inputs = (sae_in, *(p.requires_grad_() for p in (W_enc_T, b_enc, W_dec)), acts.rows, acts.cols)
    assert torch.autograd.gradcheck(Reconstruction.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_and_backward_equal_dense_autograd(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    sae_in, target = rand(BATCH, D_IN), rand(BATCH, D_OUT)
    W_enc_T, b_enc, W_dec = (p.requires_grad_() for p in (rand(D_SAE, D_IN), rand(D_SAE), rand(D_SAE, D_OUT)))
    pre = sae_in @ W_enc_T.T + b_enc
    cut = batch_topk_threshold(pre.detach(), K)
    feature_acts = pre * (pre >= cut)
    feature_acts.retain_grad()
    sae_out = feature_acts @ W_dec
    (sae_out - target).pow(2).sum().backward()

    acts = keep_above(pre.detach(), cut)
    decoded = sparse_decode(acts, W_dec.detach())
    torch.testing.assert_close(decoded, sae_out.detach())
    grads = sparse_backward(acts, sae_in, 2 * (decoded - target), W_dec.detach())
    assert feature_acts.grad is not None
    assert W_dec.grad is not None
    torch.testing.assert_close(grads.acts, feature_acts.grad[acts.rows, acts.cols], rtol=1e-5, atol=1e-4)
    for found, parameter in ((grads.W_enc_T, W_enc_T), (grads.W_dec, W_dec), (grads.b_enc, b_enc)):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grads.radial, (W_dec.grad * W_dec).sum(1).detach(), rtol=1e-5, atol=1e-4)


def test_a_feature_that_fires_nowhere_has_no_gradient() -> None:
    acts = some_acts()
    grads = sparse_backward(acts, torch.randn(BATCH, D_IN), torch.randn(BATCH, D_OUT), torch.randn(D_SAE, D_OUT))
    silent = acts.counts() == 0
    assert bool(silent[5])
    for grad in (grads.W_enc_T, grads.W_dec, grads.b_enc[:, None], grads.radial[:, None]):
        assert float(grad[silent].abs().sum()) == 0.0
        assert bool((grad[~silent].abs().sum(1) > 0).all())


def test_nothing_active_decodes_to_zero() -> None:
    none = keep_above(-torch.rand(3, 4), 0.0)
    assert sparse_decode(none, torch.randn(4, 2)).tolist() == [[0.0] * 2] * 3
    grads = sparse_backward(none, torch.randn(3, 5), torch.randn(3, 2), torch.randn(4, 2))
    assert float(grads.W_enc_T.abs().sum() + grads.W_dec.abs().sum()) == 0.0


@pytest.mark.parametrize("d_sae", [D_SAE, 2**16 + 7])  # the wider one passes what 16 bits can number
def test_the_order_by_feature_is_that_of_the_transpose(d_sae: int) -> None:
    generator = torch.Generator().manual_seed(3)
    acts = topk_rows(torch.rand(5, d_sae, generator=generator), 7)
    order, starts = acts.by_feature()
    key = acts.cols[order] * 5 + acts.rows[order]
    assert bool((key.diff() > 0).all())
    assert torch.equal(starts.diff(), acts.counts())
    assert torch.equal(acts.row_starts(), torch.arange(6) * 7)


def test_stacked_parts_and_ranges_of_features_are_slices_of_the_whole() -> None:
    acts = some_acts()
    dense = acts.to_dense()
    parts = [keep_above(rows, float(acts.values.min())) for rows in torch.split(dense, 5)]
    stacked = SparseActs.stack(parts)
    for found, expected in zip(stacked, acts, strict=True):
        assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected
    assert torch.equal(acts.features(10, 30).to_dense(), dense[:, 10:30])

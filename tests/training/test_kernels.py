"""The sparse arithmetic equals the dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.kernels import SparseActs, batch_topk_threshold, keep_above, sparse_backward, sparse_decode

BATCH, D_IN, D_SAE, K = 12, 8, 40, 3


def dense(acts: SparseActs) -> Tensor:
    found = torch.zeros(acts.shape)
    found[acts.rows, acts.cols] = acts.values
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("guess", [-1.0, 0.0, 0.3, 1e-8, 50.0])
def test_the_threshold_keeps_exactly_k_a_row_on_average_whatever_the_guess(seed: int, guess: float) -> None:
    pre = torch.randn(BATCH, D_SAE, generator=torch.Generator().manual_seed(seed))
    cut = batch_topk_threshold(pre, K, guess=guess)
    assert cut == float(pre.flatten().sort(descending=True).values[K * BATCH - 1])
    kept = keep_above(pre, cut)
    assert kept.values.numel() == K * BATCH
    torch.testing.assert_close(dense(kept), pre * (pre >= cut), rtol=0, atol=0)


def test_ties_at_the_threshold_are_all_kept() -> None:
    pre = torch.tensor([[2.0, 1.0, 1.0, 1.0], [0.5, -1.0, 0.0, 0.2]])
    for guess in (0.0, 0.9, 1.0, 2.0):
        assert batch_topk_threshold(pre, 1, guess=guess) == 1.0
    assert keep_above(pre, 1.0).values.tolist() == [2.0, 1.0, 1.0, 1.0]
    same = torch.full((3, 4), 0.5)
    assert keep_above(same, batch_topk_threshold(same, 1, guess=0.4)).values.numel() == 12


@pytest.mark.parametrize("guess", [0.0, 0.1, 5.0])
def test_with_fewer_positives_than_wanted_all_of_them_are_kept_and_nothing_else(guess: float) -> None:
    pre = torch.tensor([[0.5, -1.0, 0.0], [-2.0, 0.1, -0.0]])
    cut = batch_topk_threshold(pre, 2, guess=guess)
    assert cut == 0.0
    assert keep_above(pre, cut).values.tolist() == [0.5, pytest.approx(0.1)]
    none = keep_above(-pre.abs(), batch_topk_threshold(-pre.abs(), 2, guess=guess))
    assert none.values.numel() == 0
    assert sparse_decode(none, torch.randn(3, 4)).tolist() == [[0.0] * 4] * 2


def test_both_compressed_forms_hold_the_same_matrix() -> None:
    pre = torch.randn(BATCH, D_SAE)
    pre[3] = -1.0  # a row, and a column, without an entry
    pre[:, 5] = -1.0
    acts = keep_above(pre, batch_topk_threshold(pre, K))
    torch.testing.assert_close(acts.csr().to_dense(), dense(acts))
    torch.testing.assert_close(acts.csr_transposed().to_dense(), dense(acts).T)
    other = torch.randn(acts.values.shape)
    torch.testing.assert_close(acts.csr(other).to_dense(), acts.csr_transposed(other).to_dense().T)


def test_decode_and_backward_equal_dense_autograd() -> None:
    x, b_dec = torch.randn(BATCH, D_IN), torch.randn(D_IN)
    W_enc, b_enc = torch.randn(D_IN, D_SAE, requires_grad=True), torch.randn(D_SAE, requires_grad=True)
    W_dec = torch.randn(D_SAE, D_IN, requires_grad=True)
    centred = x - b_dec
    pre = centred @ W_enc + b_enc
    cut = batch_topk_threshold(pre.detach(), K)
    feature_acts = pre * (pre >= cut)
    feature_acts.retain_grad()
    sae_out = feature_acts @ W_dec
    (sae_out - centred).pow(2).sum().backward()

    acts = keep_above(pre.detach(), cut)
    decoded = sparse_decode(acts, W_dec.detach())
    torch.testing.assert_close(decoded, sae_out.detach(), rtol=1e-5, atol=1e-5)
    grads = sparse_backward(acts, centred, 2 * (decoded - centred), W_dec.detach())
    assert feature_acts.grad is not None
    torch.testing.assert_close(grads.acts, feature_acts.grad[acts.rows, acts.cols], rtol=1e-5, atol=1e-4)
    for found, parameter in ((grads.W_enc, W_enc), (grads.W_dec, W_dec), (grads.b_enc, b_enc)):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-3)  # the gradients reach 1,000

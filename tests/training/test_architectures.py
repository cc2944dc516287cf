"""The hand-written gradients are those of the loss, and the exported form fires where the trained one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.training.samples import sparse_data
from training.architectures import BatchTopK
from training.kernels import batch_topk_threshold

D_SAE, K = 48, 4


def create(data: Tensor, **fields: int) -> BatchTopK:
    return BatchTopK.create(data, **{"d_sae": D_SAE, "k": K, "dead_after_tokens": 10**9, "seed": 0, **fields})


def reference(sae: BatchTopK, data: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """The gradients by automatic differentiation of the dense loss, the decoder's radial part taken away."""
    parameters = {name: p.clone().requires_grad_() for name, p in sae.parameters().items()}
    W_enc, W_dec, b_enc, b_dec = (parameters[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    x = data / sae.norm
    pre = (x - b_dec) @ W_enc + b_enc
    feature_acts = pre * (pre >= batch_topk_threshold(pre.detach(), sae.k))
    sae_out = feature_acts @ W_dec + b_dec
    variance = (x - x.mean(0)).pow(2).sum()
    loss = (sae_out - x).pow(2).sum() / variance
    if len(dead):
        values, positions = pre[:, dead].topk(min(sae.aux_k, len(dead)), dim=1)
        dead_acts = torch.zeros(len(x), len(dead)).scatter(1, positions, values.relu())
        residual = (x - sae_out).detach()
        share = min(1.0, len(dead) / sae.aux_k)
        loss = loss + share / 32 * (dead_acts @ W_dec[dead] - residual).pow(2).sum() / variance
    loss.backward()
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    return grads


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_the_gradients_are_those_of_the_loss(n_dead: int) -> None:
    data = sparse_data(64)
    sae = create(data)
    sae.b_enc = 0.1 * torch.randn(D_SAE)
    sae.b_dec = sae.b_dec + 0.1 * torch.randn(16)
    dead = torch.arange(n_dead) * 2
    sae.b_enc[dead] -= 3.0  # they fire nowhere
    sae.dead_after_tokens, sae.tokens_since_fired[dead] = 1000, 10_000
    expected = reference(sae, data, dead)
    grads, stats = sae.gradients(data)
    assert stats.dead_fraction == pytest.approx(n_dead / D_SAE)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_the_decoders_gradient_has_no_radial_part_and_steps_keep_it_on_the_sphere() -> None:
    data = sparse_data(64)
    sae = create(data)
    grads, _ = sae.gradients(data)
    assert float((grads["W_dec"] * sae.W_dec).sum(1).abs().max()) < 1e-6
    sae.W_dec -= 0.1 * grads["W_dec"]
    sae.renormalise()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_dead_features_are_revived_through_their_encoder() -> None:
    data = sparse_data(64)
    sae = create(data, dead_after_tokens=100)
    sae.W_enc[:, :5] *= 0.1  # outside the batch's top k, though often positive
    first, stats = sae.gradients(data)
    assert stats.dead_fraction == 0.0
    assert float(first["W_enc"][:, :5].abs().sum()) == 0.0
    second, stats = sae.gradients(data)  # now 128 tokens have gone by
    dead = sae.tokens_since_fired > 100
    assert stats.dead_fraction == pytest.approx(float(dead.float().mean()))
    assert bool(dead[:5].all())
    for name, columns in (
        ("W_enc", second["W_enc"].T),
        ("W_dec", second["W_dec"]),
        ("b_enc", second["b_enc"][:, None]),
    ):
        assert bool((columns[:5].abs().sum(1) > 0).all()), name


def test_a_feature_that_fires_is_alive_again() -> None:
    data = sparse_data(64)
    sae = create(data, dead_after_tokens=100)
    sae.tokens_since_fired += 1000
    sae.b_enc[:5] = -100.0
    _, stats = sae.gradients(data)
    assert bool((sae.tokens_since_fired[:5] == 1064).all())
    assert set(sae.tokens_since_fired.tolist()) == {0, 1064}
    assert stats.dead_fraction == pytest.approx(float((sae.tokens_since_fired > 0).float().mean()))


def test_l0_is_k_and_fvu_the_share_of_variance_left() -> None:
    data = sparse_data(64)
    sae = create(data)
    _, stats = sae.gradients(data)
    assert stats.l0 == K
    x = data / sae.norm
    pre = torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc)
    out = (pre * (pre >= batch_topk_threshold(pre, K))) @ sae.W_dec + sae.b_dec
    assert stats.fvu == pytest.approx(float((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-4)


def test_the_exported_form_fires_where_the_trained_one_does() -> None:
    data = 7.5 * sparse_data(256)
    sae = create(data)
    sae.b_enc, sae.b_dec = 0.1 * torch.randn(D_SAE), sae.b_dec + 0.1
    sae.gradients(data)
    x = data / sae.norm
    pre = torch.addmm(sae.b_enc, x - sae.b_dec, sae.W_enc)
    feature_acts = pre * (pre > sae.threshold)
    exported = sae.export("blocks.0.hook_resid_post")
    found = exported.encode(data)
    clear = (pre - sae.threshold).abs() > 1e-5
    assert float(clear.float().mean()) > 0.99
    assert torch.equal((found > 0)[clear], (feature_acts > 0)[clear])
    torch.testing.assert_close(found[clear], sae.norm * feature_acts[clear], rtol=1e-4, atol=1e-3)
    sae_out = exported.decode(sae.norm * feature_acts)
    torch.testing.assert_close(sae_out, sae.norm * (feature_acts @ sae.W_dec + sae.b_dec), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_the_export_is_a_copy() -> None:
    data = sparse_data(64)
    sae = create(data)
    exported = sae.export("blocks.0.hook_resid_post")
    before = exported.W_enc.clone()
    sae.W_enc += 1
    assert torch.equal(exported.W_enc, before)

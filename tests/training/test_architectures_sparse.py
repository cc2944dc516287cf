"""The top-k family's hand-written gradients are those of the dense loss, dead features' encoders included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.errors import DataError
from tests.training.samples import sparse_data
from tests.training.test_architectures import D_SAE, K, create, target_of
from training.architectures import MatryoshkaBatchTopK, SkipTranscoder, TopK
from training.architectures.sparse import _CHUNK_ELEMENTS
from training.kernels import batch_topk_threshold

FAMILY = ["topk", "batch_topk", "matryoshka_batch_topk", "skip_transcoder"]


def perturbed(name: str, data: Tensor, dead: Tensor) -> Any:
    """With parameters that are not what they started from; the features `dead` fire nowhere and count as dead."""
    sae = create(name, data, dead_after_tokens=1000)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    sae.renormalise()
    if len(dead):
        sae.W_enc_T[dead] *= 0.02  # outside the top k, though often positive
        sae.b_enc[dead] = 0.01
        sae.tokens_since_fired[dead] = 10_000
    return sae


def dense_loss(sae: Any, p: dict[str, Tensor], data: Tensor, dead: Tensor) -> Tensor:
    """The family's loss with dense products alone."""
    x, target = data / sae.norm, data / sae.norm
    if isinstance(sae, SkipTranscoder):
        target = target_of(data) / sae.norm_out
        sae_in, skip = x, x @ p["W_skip"]
    else:
        sae_in, skip = x - p["b_dec"], torch.zeros(())
    pre = sae_in @ p["W_enc_T"].T + p["b_enc"]
    if isinstance(sae, TopK):
        cut = pre.detach().topk(K, dim=1).values[:, -1:]
    else:
        cut = torch.tensor(batch_topk_threshold(pre.detach(), K), dtype=pre.dtype)
    acts = pre * ((pre >= cut) & (pre > 0))
    unit = (target - target.mean(0)).pow(2).sum() / target.shape[1]
    ends = sae.group_ends if isinstance(sae, MatryoshkaBatchTopK) else [sae.d_sae]
    errors = [acts[:, :end] @ p["W_dec"][:end] + p["b_dec"] + skip - target for end in ends]
    loss = torch.stack([error.pow(2).sum() for error in errors]).mean() / unit
    if len(dead):
        values, positions = pre[:, dead].topk(min(sae.aux_k, len(dead)), dim=1)
        dead_acts = torch.zeros_like(pre[:, dead]).scatter(1, positions, values.relu())
        residual = -errors[-1].detach()
        share = min(1.0, len(dead) / sae.aux_k) * sae.options.aux_coefficient
        loss = loss + share * (dead_acts @ p["W_dec"][dead] - residual).pow(2).sum() / unit
    return loss


def autograd(sae: Any, data: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """The dense loss's gradients, the decoder's radial part taken away."""
    p = {name: value.clone().requires_grad_() for name, value in sae.parameters().items()}
    grads = dict(zip(p, torch.autograd.grad(dense_loss(sae, p, data, dead), list(p.values())), strict=True))
    grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    return grads


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_the_gradients_are_those_of_the_dense_loss(name: str, n_dead: int) -> None:
    data = sparse_data(64).double()
    dead = torch.arange(n_dead) * 2
    sae = perturbed(name, data, dead)
    expected = autograd(sae, data, dead)
    grads, stats = sae.gradients(data, target_of(data))
    assert stats.dead_fraction == pytest.approx(n_dead / D_SAE)
    assert stats.l0 <= K
    for key, grad in grads.items():
        assert grad.dtype == torch.float64
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_a_dead_features_encoder_gets_the_auxiliary_gradient(name: str) -> None:
    data = sparse_data(64).double()
    dead = torch.tensor([1, 8, 30])
    sae = perturbed(name, data, dead)
    expected = autograd(sae, data, dead)
    grads, _ = sae.gradients(data, target_of(data))
    for key in ("W_enc_T", "W_dec", "b_enc"):
        found = grads[key][dead].reshape(3, -1)
        assert bool((found.abs().sum(1) > 0).all()), key
        torch.testing.assert_close(found, expected[key][dead].reshape(3, -1), rtol=1e-9, atol=1e-14)
    off = create(name, data, dead_after_tokens=1000, options={"aux_coefficient": 0.0})
    for key, parameter in sae.parameters().items():
        off.parameters()[key].copy_(parameter)
    off.tokens_since_fired[dead] = 10_000
    without, _ = off.gradients(data, target_of(data))
    assert float(without["W_enc_T"][dead].abs().sum()) == 0.0


@pytest.mark.parametrize("name", FAMILY)
def test_a_feature_that_fires_is_alive_again(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data, dead_after_tokens=100)
    sae.tokens_since_fired += 1000
    sae.b_enc[:5] = -100.0
    _, stats = sae.gradients(data, target_of(data))
    assert bool((sae.tokens_since_fired[:5] == 1064).all())
    assert set(sae.tokens_since_fired.tolist()) == {0, 1064}
    assert stats.dead_fraction == pytest.approx(float((sae.tokens_since_fired > 0).float().mean()))


@pytest.mark.parametrize("name", FAMILY)
def test_l0_is_k(name: str) -> None:
    data = sparse_data(64)
    _, stats = create(name, data).gradients(data, target_of(data))
    assert stats.l0 == K


@pytest.mark.parametrize("name", FAMILY)
def test_chunks_of_the_batch_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sparse_data(100).double()
    expected, stats = create(name, data).gradients(data, target_of(data))
    monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", 7 * D_SAE)
    found, found_stats = create(name, data).gradients(data, target_of(data))
    assert found_stats == pytest.approx(stats)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key])


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka_batch_topk"])
def test_the_threshold_follows_the_smallest_active_value(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data)
    sae.gradients(data)
    pre = torch.addmm(sae.b_enc, data / sae.norm - sae.b_dec, sae.W_enc)
    first = sae.threshold
    assert first == pytest.approx(batch_topk_threshold(pre, K))
    sae.b_enc += 1.0
    sae.gradients(data)
    assert sae.threshold == pytest.approx(first + 0.1, rel=1e-3)


def test_matryoshka_prefixes_double_to_the_whole_dictionary_unless_given() -> None:
    data = sparse_data(64)
    assert create("matryoshka_batch_topk", data).group_ends == [3, 6, 12, 24, 48]
    given = create("matryoshka_batch_topk", data, options={"group_sizes": (10, 38)})
    assert given.group_ends == [10, 48]
    for sizes in ((10, 37), (0, 48), (-1, 49)):
        with pytest.raises(DataError, match=r"'group_sizes'.*sum to d_sae 48"):
            create("matryoshka_batch_topk", data, options={"group_sizes": sizes})


def test_one_matryoshka_group_is_batch_topk() -> None:
    data = sparse_data(64)
    expected, _ = create("batch_topk", data).gradients(data)
    found, _ = create("matryoshka_batch_topk", data, options={"group_sizes": (D_SAE,)}).gradients(data)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key])

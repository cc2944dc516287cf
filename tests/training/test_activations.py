"""What is computed in blocks and chunks equals what is computed plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import training.activations
from feature_bank.schema import Pooling
from tests.training.samples import random_sae
from training.activations import batch_topk_agreement, encode_tokens, feature_stats, pool_documents

TOKENS, N_DOCUMENTS = 3000, 60
POOLING = Pooling(window=8, min_tokens=4, ceiling=0.8, evidence_tokens=2)


@pytest.fixture(scope="module")
def activations() -> torch.Tensor:
    return torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def documents() -> np.ndarray:
    """Consecutive rows of documents 0, 2, 3, ...: document 1 has none, document 0 three."""
    lengths = np.random.default_rng(0).integers(1, 60, N_DOCUMENTS)
    lengths[:2] = 3, 0
    found = np.repeat(np.arange(N_DOCUMENTS), lengths)[:TOKENS]
    return np.concatenate([found, np.full(TOKENS - len(found), N_DOCUMENTS - 1)])


def test_the_scale_is_the_999th_permille(activations: torch.Tensor) -> None:
    sae = random_sae()
    sae.threshold[3], sae.threshold[4] = 1e6, 0.0
    acts = sae.encode(activations.float()).numpy()
    sae.threshold[4] = float(np.sort(acts[:, 4])[-2])  # fires on one token alone
    acts = sae.encode(activations.float()).numpy()
    expected = np.quantile(acts, 0.999, axis=0, method="higher")
    expected[3], expected[4] = 1.0, acts[:, 4].max()
    for block in (512, 7):
        stats = feature_stats(sae, activations, block=block)
        np.testing.assert_allclose(stats.scale, expected, rtol=1e-4)
        np.testing.assert_allclose(stats.density, (acts > 0).mean(0), atol=1e-3)
    assert stats.density[3] == 0.0


def test_a_long_corpus_is_sampled_evenly(activations: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.activations, "_SAMPLE_TOKENS", 1000)
    sampled, every_third = feature_stats(random_sae(), activations), feature_stats(random_sae(), activations[::3])
    np.testing.assert_array_equal(sampled.scale, every_third.scale)


@pytest.mark.parametrize("chunk", [7, 8192])
def test_pooling_equals_a_loop_over_documents(
    activations: torch.Tensor, documents: np.ndarray, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.activations, "CHUNK", chunk)
    sae = random_sae()
    scale = np.linspace(0.5, 3, sae.d_sae).astype(np.float32)
    pooled = pool_documents(sae, activations, documents, N_DOCUMENTS, scale, POOLING)
    acts = sae.encode(activations.float()).numpy() / scale
    for document in range(N_DOCUMENTS):
        own = np.minimum(acts[documents == document], POOLING.ceiling)
        expected = own.sum(0) / max(len(own), POOLING.min_tokens)
        np.testing.assert_allclose(pooled[document], expected, rtol=2e-3, atol=1e-3)
    assert not pooled[1].any()


@pytest.mark.parametrize("chunk", [7, 8192])
def test_selected_features_are_encoded_as_in_the_whole(
    activations: torch.Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.activations, "CHUNK", chunk)
    sae, features = random_sae(), [5, 0, 23, 11]
    scale = np.linspace(0.5, 3, sae.d_sae).astype(np.float32)
    found = encode_tokens(sae, activations, features, scale)
    np.testing.assert_allclose(
        found, sae.select(features).encode(activations.float()).numpy() / scale[features], rtol=1e-3, atol=1e-4
    )
    whole = sae.encode(activations.float()).numpy()[:, features] / scale[features]
    clear = np.abs(whole - sae.threshold[features].numpy() / scale[features]) > 1e-4
    np.testing.assert_allclose(found[clear], whole[clear], rtol=1e-3, atol=1e-4)


def test_agreement_is_full_where_the_threshold_is_the_batchs_own(activations: torch.Tensor) -> None:
    sae, k, features = random_sae(), 3, [1, 4, 9]
    x = activations[:2000].float()
    weight, bias = sae.folded_encoder()
    pre = torch.addmm(bias, x, weight)
    ranked = pre.flatten().sort(descending=True).values
    sae.threshold[:] = (ranked[k * 2000 - 1] + ranked[k * 2000]) / 2
    assert batch_topk_agreement(sae, activations[:2000], features, k) == (1.0, 1.0)
    sae.threshold[:] = 0.0
    precision, recall = batch_topk_agreement(sae, activations[:2000], features, k)
    assert precision < 1.0 == recall
    sae.threshold[:] = 1e6
    assert batch_topk_agreement(sae, activations[:2000], features, k) == (0.0, 0.0)

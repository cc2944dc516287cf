"""Figures of SAEs on activations: against plain formulas, however rows are cut, of perfect and of worthless SAEs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.sae import SAE
from tests.training.quality_samples import constant_sae, identity_sae, on_rows
from tests.training.samples import random_sae, sparse_data
from training.quality import DENSITY_EDGES, DensityHistogram, measure_reconstruction

# Figures on activations


def test_figures_follow_their_definitions() -> None:
    x, sae = sparse_data(d_in=8), random_sae()
    found = on_rows(sae, x)
    x, acts, x_hat = x.double(), sae.encode(x).double(), sae.reconstruct(x).double()
    residual, variance = (x - x_hat).pow(2).sum(1), (x - x.mean(0)).pow(2).sum(1)
    expected = {
        "fvu": residual.sum() / variance.sum(),
        "explained_variance": 1 - residual.sum() / variance.sum(),
        "explained_variance_legacy": (1 - residual / variance).mean(),
        "mse": residual.mean(),
        "cossim": torch.cosine_similarity(x, x_hat).mean(),
        "l2_norm_in": x.norm(dim=1).mean(),
        "l2_norm_out": x_hat.norm(dim=1).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.pow(2).sum() / (x * x_hat).sum(),
        "l0": (acts != 0).sum(1).double().mean(),
        "l1": acts.sum(1).mean(),
        "frac_alive": (acts != 0).any(0).double().mean(),
        "freq_over_10_percent": ((acts != 0).double().mean(0) > 0.1).double().mean(),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    assert found.tokens == 1024
    assert found.outlier_tokens == 0
    np.testing.assert_allclose(found.feature_density, (acts != 0).double().mean(0).numpy())


def test_a_worked_example_of_explained_variance() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])  # squared distances from the mean (1, 2): 5 and 5
    found = on_rows(constant_sae(torch.tensor([2.0, 0.0])), x)  # squared residuals: 0 and 20
    assert found.explained_variance == pytest.approx(1 - 20 / 10)
    assert found.explained_variance_legacy == pytest.approx(((1 - 0 / 5) + (1 - 20 / 5)) / 2)
    assert found.mse == pytest.approx(10)


@pytest.mark.parametrize("chunk", [1, 7, 100, 1023])
def test_figures_do_not_depend_on_how_rows_are_cut(chunk: int) -> None:
    rows, sae = sparse_data(d_in=8), random_sae()
    whole, cut = on_rows(sae, rows), on_rows(sae, rows, chunk)
    np.testing.assert_array_equal(cut.feature_density, whole.feature_density)
    a, b = whole.to_dict(), cut.to_dict()
    assert a.pop("density_histogram") == b.pop("density_histogram")
    assert b == pytest.approx(a, rel=1e-6)


def test_memory_is_bounded_by_the_dictionary_not_by_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    sae = random_sae()
    monkeypatch.setattr("training.quality._CHUNK_VALUES", 24 * 10)
    encode = SAE.encode

    def watched(self: SAE, sae_in: Tensor) -> Tensor:
        seen.append(len(sae_in))
        return encode(self, sae_in)

    monkeypatch.setattr(SAE, "encode", watched)
    on_rows(sae, sparse_data(d_in=8))
    assert max(seen) == 10
    assert sum(seen) == 1024


def test_a_perfect_sae_explains_everything() -> None:
    found = on_rows(identity_sae(width=8), sparse_data(d_in=8))
    assert (found.fvu, found.mse) == (0.0, 0.0)
    assert (found.explained_variance, found.explained_variance_legacy) == (1.0, 1.0)
    assert found.cossim == pytest.approx(1)
    assert found.l2_ratio == pytest.approx(1)
    assert found.relative_reconstruction_bias == pytest.approx(1)
    assert found.l0 == pytest.approx(8)


def test_predicting_the_mean_explains_nothing_and_predicting_zero_less() -> None:
    rows = sparse_data(d_in=8)
    mean = on_rows(constant_sae(rows.mean(0)), rows)
    assert mean.explained_variance == pytest.approx(0, abs=1e-6)
    zero = on_rows(constant_sae(torch.zeros(8)), rows)
    assert zero.explained_variance is not None
    assert zero.explained_variance < 0
    assert zero.relative_reconstruction_bias is None
    assert (zero.cossim, zero.l2_ratio, zero.l0, zero.l1) == (0, 0, 0, 0)
    assert (zero.frac_alive, zero.dead_fraction) == (0, 1)


def test_a_shrunken_reconstruction_shows_as_shrinkage() -> None:
    sae = identity_sae(width=8)
    half = SAE(**{**vars(sae), "W_dec": sae.W_dec / 2})
    found = on_rows(half, sparse_data(d_in=8))
    assert found.l2_ratio == pytest.approx(0.5)
    assert found.relative_reconstruction_bias == pytest.approx(0.5)
    assert found.cossim == pytest.approx(1)


def test_what_rows_cannot_show_is_none_and_valid_json() -> None:
    rows = torch.ones(4, 8)  # no variance
    found = on_rows(constant_sae(torch.zeros(8)), rows)
    assert (found.fvu, found.explained_variance, found.explained_variance_legacy) == (None, None, None)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["fvu"] is None
    assert plain["density_histogram"]["dead"] == 5
    assert "feature_density" not in plain


def test_attention_sinks_are_left_out_and_counted() -> None:
    rows, sae = sparse_data(d_in=8), random_sae()
    plain = on_rows(sae, rows).to_dict()
    with_sinks = torch.cat([rows[:500], 1000 * rows[:3], rows[500:], 1000 * rows[3:4]])
    found = on_rows(sae, with_sinks).to_dict()
    assert found.pop("outlier_tokens") == 4
    assert plain.pop("outlier_tokens") == 0
    histogram = found.pop("density_histogram"), plain.pop("density_histogram")
    assert histogram[0] == histogram[1]
    assert found == pytest.approx(plain, rel=1e-5)


def test_a_transcoder_is_measured_against_its_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator)
    skip = torch.randn(8, 6, generator=generator)
    offset = torch.randn(6, generator=generator)
    transcoder = SAE(
        W_enc=torch.zeros(8, 5),
        W_dec=torch.zeros(5, 6),
        b_enc=torch.zeros(5),
        b_dec=offset,
        threshold=torch.zeros(5),
        hook_name="blocks.0.hook_resid_pre",
        hook_name_out="blocks.0.hook_mlp_out",
        apply_b_dec_to_input=False,
        W_skip=skip,
    )
    rows = {"blocks.0.hook_resid_pre": x, "blocks.0.hook_mlp_out": x @ skip + offset}
    found = measure_reconstruction({"t": transcoder}, lambda: iter([rows]))["t"]
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.l0 == 0
    with pytest.raises(DataError, match=r"blocks\.0\.hook_mlp_out"):
        measure_reconstruction({"t": transcoder}, lambda: iter([{"blocks.0.hook_resid_pre": x}]))


# The density histogram


@pytest.mark.parametrize("seed", range(4))
def test_the_histogram_holds_every_feature_once(seed: int) -> None:
    generator = np.random.default_rng(seed)
    density = generator.random(500) ** generator.integers(1, 12, 500)
    density[generator.random(500) < 0.2] = 0
    density[:3] = 1.0, 1e-8, 1e-12
    found = DensityHistogram.of(density)
    assert sum(found.counts) + found.dead == 500
    assert found.dead == (density == 0).sum()
    assert len(found.counts) == len(DENSITY_EDGES) - 1


def test_the_histogram_of_a_measured_sae_sums_to_d_sae_and_densities_to_l0() -> None:
    found = on_rows(random_sae(threshold=15.0), sparse_data(d_in=8))
    assert 0 < found.density_histogram.dead < 24
    assert sum(found.density_histogram.counts) + found.density_histogram.dead == 24
    assert found.feature_density.sum() == pytest.approx(found.l0)
    assert found.dead_fraction == pytest.approx(found.density_histogram.dead / 24)


def test_a_density_lies_in_the_bin_of_its_power_of_ten() -> None:
    found = DensityHistogram.of(np.array([1.0, 0.1, 0.001]))
    assert [DENSITY_EDGES[i] for i, n in enumerate(found.counts) if n] == [-3.0, -1.0, -0.25]

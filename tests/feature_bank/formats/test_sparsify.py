"""Sparsify folders: the documented formulas, from the documented layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from tests.feature_bank.formats import samples


def test_encoder_subtracts_the_bias_and_the_decoder_is_not_transposed(tmp_path: Path) -> None:
    sae = load_sae(samples.make_sparsify(tmp_path / "layers.2"))
    t, x = samples.sparsify_tensors(), samples.normal(30, samples.D_IN)
    acts = samples.top_k((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 5)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.reconstruct(x), acts @ t["W_dec"] + t["b_dec"])
    assert torch.equal(sae.W_dec, t["W_dec"])
    assert torch.equal(sae.W_enc, t["encoder.weight"].T)


def test_square_decoder_is_not_transposed_either(tmp_path: Path) -> None:
    """Where d_sae is d_in, only the values show which way round it was read."""
    tensors = {name: t[: samples.D_IN] for name, t in samples.sparsify_tensors().items()}
    samples.write_json(tmp_path / "layers.2" / "cfg.json", samples.sparsify_config(expansion_factor=1))
    samples.write_safetensors(tmp_path / "layers.2" / "sae.safetensors", tensors)
    assert torch.equal(load_sae(tmp_path / "layers.2").W_dec, tensors["W_dec"])


def test_transcoder_reads_the_raw_input_and_adds_its_skip(tmp_path: Path) -> None:
    sae = load_sae(samples.make_sparsify(tmp_path / "layers.2.mlp", skip=True, transcode=True))
    t, x = samples.sparsify_tensors(skip=True), samples.normal(30, samples.D_IN)
    acts = samples.top_k(x @ t["encoder.weight"].T + t["encoder.bias"], 5)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.reconstruct(x), acts @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T)
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out")


def test_sae_with_a_skip_subtracts_the_bias_but_skips_from_the_raw_input(tmp_path: Path) -> None:
    source = read_source(samples.make_sparsify(tmp_path / "layers.2", skip=True))
    t, x = samples.sparsify_tensors(skip=True), samples.normal(30, samples.D_IN)
    acts = samples.top_k((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 5)
    torch.testing.assert_close(source.sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    expected = acts @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T
    torch.testing.assert_close(source.sae.reconstruct(x), expected, atol=1e-5, rtol=1e-5)
    assert source.sae.hook_name_out == source.sae.hook_name == "blocks.2.hook_resid_post"
    assert len(source.notes) == 1


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.7", "blocks.7.hook_resid_post"),
        ("model.layers.7", "blocks.7.hook_resid_post"),
        ("gpt_neox.layers.7", "blocks.7.hook_resid_post"),
        ("h.7", "blocks.7.hook_resid_post"),
        ("layers.7.mlp", "blocks.7.hook_mlp_out"),
        ("layers.7.mlp/seed3", "blocks.7.hook_mlp_out"),
    ],
)
def test_hook_point_is_told_from_the_folder_and_the_model_from_the_run(tmp_path: Path, name: str, hook: str) -> None:
    samples.write_json(tmp_path / "config.json", {"model": "EleutherAI/pythia-70m"})
    source = read_source(samples.make_sparsify(tmp_path / name))
    assert (source.sae.hook_name, source.model_name) == (hook, "EleutherAI/pythia-70m")


@pytest.mark.parametrize("name", ["embed_tokens", "layers.7.self_attn", "mine"])
def test_hook_point_that_cannot_be_told_must_be_named(tmp_path: Path, name: str) -> None:
    folder = samples.make_sparsify(tmp_path / name)
    with pytest.raises(BankError, match="name it") as error:
        load_sae(folder)
    assert error.value.field == "hook_name"
    assert load_sae(folder, hook_name="blocks.0.hook_resid_pre").hook_name == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"activation": "groupmax"}, "activation"),
        ({"signed": True}, "signed"),
        ({"d_in": 9}, "d_in"),
        ({"num_latents": 25}, "num_latents"),
        ({"expansion_factor": 4}, "expansion_factor"),
        ({"k": 0}, "k"),
        ({"k": 25}, "k"),
        ({"k": None}, "k"),
        ({"k": True}, "k"),
        ({"skip_connection": True}, "skip_connection"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    folder = samples.make_sparsify(tmp_path / "layers.2")
    samples.write_json(folder / "cfg.json", samples.sparsify_config(**change))
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert (error.value.file, error.value.field) == (str(folder / "cfg.json"), field)


def test_stated_width_wins_over_the_expansion_factor(tmp_path: Path) -> None:
    folder = samples.make_sparsify(tmp_path / "layers.2", num_latents=samples.D_SAE, expansion_factor=32)
    assert load_sae(folder).d_sae == samples.D_SAE

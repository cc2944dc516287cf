"""Llama Scope: SAEs that were trained on scaled activations work on raw ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from tests.feature_bank.formats import samples
from tests.feature_bank.formats.samples import (
    D_IN,
    D_SAE,
    HOOK,
    llama_config,
    llama_tensors,
    make_llama,
    normal,
    positive,
)

SCALE = math.sqrt(D_IN) / 4.0  # the samples' average length is 4
NORM = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(4.0)}


def check(folder: Path, acts: Tensor, scale_out: float = SCALE) -> None:
    t, sae, x = llama_tensors(), load_sae(folder), normal(40, D_IN)
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    expected = (acts @ t["W_D"] + t["b_D"]) / scale_out
    torch.testing.assert_close(sae.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


def pre_activations() -> Tensor:
    t = llama_tensors()
    return (normal(40, D_IN) * SCALE) @ t["W_E"] + t["b_E"]


def test_scale_of_the_training_is_folded_in(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "L2R", model_name="llama")
    check(folder, samples.jump(pre_activations(), positive(D_SAE, seed=4)))
    source = read_source(folder)
    assert (source.sae.hook_name, source.sae.hook_name_out, source.model_name) == (HOOK, None, "llama")
    assert "folded in" in source.notes[0]


def test_relu(tmp_path: Path) -> None:
    check(make_llama(tmp_path / "a", {}, act_fn="relu"), torch.relu(pre_activations()))


def test_top_k(tmp_path: Path) -> None:
    check(make_llama(tmp_path / "a", {}, act_fn="topk", top_k=5), samples.top_k(pre_activations(), 5))


def test_threshold_is_compared_times_the_decoder_norm_where_that_is_set(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "a", sparsity_include_decoder_norm=True)
    norm, pre = llama_tensors()["W_D"].norm(dim=1), pre_activations()
    check(folder, samples.jump(pre * norm, positive(D_SAE, seed=4)) / norm)


def test_top_k_ranks_times_the_decoder_norm_where_that_is_set(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "a", {}, act_fn="topk", top_k=5, sparsity_include_decoder_norm=True)
    t, x = llama_tensors(), normal(40, D_IN)
    norm = t["W_D"].norm(dim=1)
    acts = samples.top_k(pre_activations() * norm, 5)
    expected = ((acts / norm) @ t["W_D"] + t["b_D"]) / SCALE
    torch.testing.assert_close(load_sae(folder).reconstruct(x), expected, atol=1e-5, rtol=1e-5)


def test_decoder_bias_may_be_subtracted_in_the_scale_of_the_training(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "a", {}, act_fn="relu", apply_decoder_bias_to_pre_encoder=True)
    t = llama_tensors()
    check(folder, torch.relu((normal(40, D_IN) * SCALE - t["b_D"]) @ t["W_E"] + t["b_E"]))


def test_weights_that_were_standardised_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "a", {}, act_fn="relu", norm_activation="inference")
    samples.write_safetensors(folder / "sae_weights.safetensors", llama_tensors())
    t, x = llama_tensors(), normal(40, D_IN)
    sae = load_sae(folder)
    assert torch.equal(sae.W_enc, t["W_E"])
    torch.testing.assert_close(sae.encode(x), torch.relu(x @ t["W_E"] + t["b_E"]))


def make_old(folder: Path, **changes: Any) -> Path:
    """The first Llama Scope: hyperparams.json, one scalar threshold, `nn.Linear` layouts."""
    norms = {"in": 4.0, "out": 4.0}
    config = llama_config(dataset_average_activation_norm=norms, jump_relu_threshold=0.3, top_k=50, **changes)
    samples.write_json(folder / "hyperparams.json", config)
    samples.write_safetensors(folder / "checkpoints" / "final.safetensors", llama_tensors(linear=True))
    return folder


@pytest.mark.parametrize("named", [".", "checkpoints/final.safetensors"])
def test_first_release_has_a_scalar_threshold_in_raw_units(tmp_path: Path, named: str) -> None:
    t, x = llama_tensors(linear=True), normal(40, D_IN)
    sae = load_sae(make_old(tmp_path / "Llama3_1-8B-Base-L2R-8x") / named)
    raw = x @ t["encoder.weight"].T + t["encoder.bias"] / SCALE
    torch.testing.assert_close(sae.encode(x), samples.jump(raw, 0.3) * SCALE, atol=1e-5, rtol=1e-5)
    expected = samples.jump(raw, 0.3) @ t["decoder.weight"].T + t["decoder.bias"] / SCALE
    torch.testing.assert_close(sae.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


def test_transcoder_has_a_scale_on_each_side(tmp_path: Path) -> None:
    out = "blocks.2.hook_mlp_out"
    extra = {f"dataset_average_activation_norm.{out}": torch.tensor(2.0)}
    extra |= {"log_jumprelu_threshold": positive(D_SAE, seed=4).log()}
    folder = make_llama(tmp_path / "a", extra, hook_point_out=out)
    check(folder, samples.jump(pre_activations(), positive(D_SAE, seed=4)), math.sqrt(D_IN) / 2.0)
    renamed = load_sae(folder, hook_name="blocks.9.hook_mlp_in")
    assert (renamed.hook_name, renamed.hook_name_out) == ("blocks.9.hook_mlp_in", out)


def test_naming_the_hook_point_of_an_sae_does_not_make_it_a_transcoder(tmp_path: Path) -> None:
    sae = load_sae(make_llama(tmp_path / "a"), hook_name="blocks.7.hook_resid_post")
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.7.hook_resid_post", None)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"d_model": 9}, "d_model"),
        ({"d_sae": 9}, "d_sae"),
        ({"d_sae": None, "expansion_factor": 8}, "expansion_factor"),
        ({"act_fn": "batchtopk"}, "act_fn"),
        ({"act_fn": None}, "act_fn"),
        ({"act_fn": "topk"}, "top_k"),
        ({"act_fn": "topk", "top_k": 99}, "top_k"),
        ({"norm_activation": "token-wise"}, "norm_activation"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"hook_point_in": None}, "hook_point_in"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    folder = make_llama(tmp_path / "a", **changes)
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert (error.value.file, error.value.field) == (str(folder / "config.json"), field)


def test_missing_length_is_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "a", {}, act_fn="relu")
    samples.write_safetensors(folder / "sae_weights.safetensors", llama_tensors())
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert error.value.field == "dataset_average_activation_norm"


def test_scalar_threshold_of_a_transcoder_is_not_guessed_at(tmp_path: Path) -> None:
    folder = make_old(tmp_path / "a", hook_point_out="blocks.2.hook_mlp_out")
    norms = {"in": 4.0, "out": 2.0}
    config = llama_config(dataset_average_activation_norm=norms, jump_relu_threshold=0.3)
    samples.write_json(folder / "hyperparams.json", config | {"hook_point_out": "blocks.2.hook_mlp_out"})
    with pytest.raises(BankError, match="not documented") as error:
        load_sae(folder)
    assert error.value.field == "jump_relu_threshold"

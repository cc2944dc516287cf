"""dictionary_learning folders: each class with its own formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from tests.feature_bank.formats import samples
from tests.feature_bank.formats.samples import D_IN, D_SAE, linear_tensors, make_dictionary, normal, positive

K = 5


def pre_activations(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ t["encoder.weight"].T + t["encoder.bias"]


def check(folder: Path, x: Tensor, acts: Tensor, decoder: Tensor, bias: Tensor) -> None:
    sae = load_sae(folder)
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.reconstruct(x), acts @ decoder + bias, atol=1e-5, rtol=1e-5)
    assert 0 < (acts > 0).float().mean() < 1


@pytest.fixture
def x() -> Tensor:
    return normal(40, D_IN)


def test_auto_encoder(tmp_path: Path, x: Tensor) -> None:
    t = linear_tensors() | {"bias": normal(D_IN, seed=3)}
    folder = make_dictionary(tmp_path / "a", "AutoEncoder", t)
    check(folder, x, torch.relu(pre_activations(t, x - t["bias"])), t["decoder.weight"].T, t["bias"])


def test_auto_encoder_new_does_not_subtract_its_bias(tmp_path: Path, x: Tensor) -> None:
    t = linear_tensors() | {"decoder.bias": normal(D_IN, seed=3)}
    folder = make_dictionary(tmp_path / "a", "AutoEncoderNew", t)
    check(folder, x, torch.relu(pre_activations(t, x)), t["decoder.weight"].T, t["decoder.bias"])


def test_gated(tmp_path: Path, x: Tensor) -> None:
    t = linear_tensors(encoder_bias=False) | {
        "decoder_bias": normal(D_IN, seed=3),
        "r_mag": normal(D_SAE, seed=4) * 0.3,
        "gate_bias": normal(D_SAE, seed=5),
        "mag_bias": normal(D_SAE, seed=6),
    }
    folder = make_dictionary(tmp_path / "a", "GatedAutoEncoder", t)
    projection = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    acts = (projection + t["gate_bias"] > 0) * torch.relu(projection * t["r_mag"].exp() + t["mag_bias"])
    check(folder, x, acts, t["decoder.weight"].T, t["decoder_bias"])


def top_k_tensors(threshold: float) -> dict[str, Tensor]:
    buffers = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    return linear_tensors() | buffers | {"b_dec": normal(D_IN, seed=3)}


def test_top_k_ignores_the_threshold_that_it_tracks(tmp_path: Path, x: Tensor) -> None:
    t = top_k_tensors(0.9)
    folder = make_dictionary(tmp_path / "a", "AutoEncoderTopK", t, k=K)
    check(folder, x, samples.top_k(pre_activations(t, x - t["b_dec"]), K), t["decoder.weight"].T, t["b_dec"])
    assert load_sae(folder).k == K


@pytest.mark.parametrize("threshold", [0.9, 0.0, -1.0])
def test_batch_top_k_cuts_at_its_threshold_or_at_zero_before_it_was_set(
    tmp_path: Path, x: Tensor, threshold: float
) -> None:
    t = top_k_tensors(threshold)
    folder = make_dictionary(tmp_path / "a", "BatchTopKSAE", t, k=K)
    acts = samples.jump(pre_activations(t, x - t["b_dec"]), threshold)
    check(folder, x, acts, t["decoder.weight"].T, t["b_dec"])


def test_matryoshka(tmp_path: Path, x: Tensor) -> None:
    t = samples.gemma_tensors() | {"threshold": torch.tensor(0.7), "k": torch.tensor(K)}
    folder = make_dictionary(tmp_path / "a", "MatryoshkaBatchTopKSAE", t | {"group_sizes": torch.tensor([8, 16])})
    acts = samples.jump((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0.7)
    check(folder, x, acts, t["W_dec"], t["b_dec"])


def test_jump_relu_does_not_subtract_its_bias_and_cuts_at_zero_too(tmp_path: Path, x: Tensor) -> None:
    t = samples.gemma_tensors() | {"threshold": normal(D_SAE, seed=4)}
    folder = make_dictionary(tmp_path / "a", "JumpReluAutoEncoder", t)
    check(folder, x, samples.jump(x @ t["W_enc"] + t["b_enc"], t["threshold"]), t["W_dec"], t["b_dec"])


@pytest.mark.parametrize(
    ("trainer", "hook"),
    [
        ({}, "blocks.2.hook_resid_post"),
        ({"submodule_name": None}, "blocks.2.hook_resid_post"),
        ({"submodule_name": "mlp_out_layer_2"}, "blocks.2.hook_mlp_out"),
        ({"submodule_name": "attention_out_layer_2"}, None),
        ({"submodule_name": None, "layer": None}, None),
    ],
)
def test_hook_point_and_model_are_those_of_the_trainer(
    tmp_path: Path, trainer: dict[str, Any], hook: str | None
) -> None:
    t = samples.gemma_tensors()
    folder = make_dictionary(tmp_path / "a", "JumpReluAutoEncoder", t, **trainer)
    if hook is None:
        with pytest.raises(BankError) as error:
            load_sae(folder)
        assert error.value.field == "hook_name"
        assert load_sae(folder, hook_name="blocks.1.hook_mlp_out").hook_name == "blocks.1.hook_mlp_out"
    else:
        source = read_source(folder)
        assert (source.sae.hook_name, source.model_name) == (hook, "tiny")


@pytest.mark.parametrize(
    ("trainer", "field"),
    [
        ({"dict_class": "CrossCoder"}, "trainer.dict_class"),
        ({"dict_class": None}, "trainer.dict_class"),
        ({"activation_dim": 9}, "trainer.activation_dim"),
        ({"dict_size": 9}, "trainer.dict_size"),
        ({"k": 6}, "trainer.k"),
        ({"layer": 3}, "trainer.layer"),
        ({"layer": "two"}, "trainer.layer"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(tmp_path: Path, trainer: dict[str, Any], field: str) -> None:
    folder = make_dictionary(tmp_path / "a", "AutoEncoderTopK", top_k_tensors(0.1))
    config = json.loads((folder / "config.json").read_text())
    samples.write_json(folder / "config.json", {"trainer": {**config["trainer"], "k": K, **trainer}})
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert (error.value.file, error.value.field) == (str(folder / "config.json"), field)


def test_configuration_without_a_trainer_is_refused(tmp_path: Path) -> None:
    folder = make_dictionary(tmp_path / "a", "AutoEncoderTopK", top_k_tensors(0.1))
    samples.write_json(folder / "config.json", {"trainer": "mine"})
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert error.value.field == "trainer.dict_class"


def test_batch_top_k_without_a_threshold_depends_on_the_batch_and_is_refused(tmp_path: Path) -> None:
    t = top_k_tensors(0.1)
    del t["threshold"]
    folder = make_dictionary(tmp_path / "a", "BatchTopKSAE", t)
    with pytest.raises(BankError, match="depends on the batch") as error:
        load_sae(folder)
    assert error.value.field == "threshold"


def test_half_precision_is_kept(tmp_path: Path) -> None:
    t = {name: tensor.bfloat16() for name, tensor in samples.gemma_tensors().items()}
    sae = load_sae(make_dictionary(tmp_path / "a", "JumpReluAutoEncoder", t))
    assert sae.W_enc.dtype == sae.threshold.dtype == torch.bfloat16
    assert torch.equal(sae.W_dec, t["W_dec"])
    assert positive(3).min() > 0

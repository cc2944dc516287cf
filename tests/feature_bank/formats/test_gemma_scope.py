"""Both generations of Gemma Scope: their formula, and how the hook point is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from tests.feature_bank.formats import samples
from tests.feature_bank.formats.samples import D_IN, D_OUT, D_SAE, gemma_tensors, normal

FIRST = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
SECOND = "gemma-scope-2-1b-it/resid_post/layer_17_width_16k_l0_medium"


def test_first_generation(tmp_path: Path) -> None:
    t, x = gemma_tensors(), normal(40, D_IN)
    sae = load_sae(samples.write_npz(tmp_path / FIRST / "params.npz", t).parent)
    acts = samples.jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae.reconstruct(x), acts @ t["W_dec"] + t["b_dec"])
    assert sae.hook_name == "blocks.12.hook_resid_post"
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        assert torch.equal(getattr(sae, name), t[name])


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("gemma-scope-9b-it-res/layer_9/width_16k/canonical", "blocks.9.hook_resid_post"),
        ("models--google--gemma-scope-2b-pt-mlp/snapshots/0/layer_3/width_16k/x", "blocks.3.hook_mlp_out"),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/x", None),
        ("layer_3/width_16k/average_l0_50", None),
        ("my-res-data/layer_3/width_16k/average_l0_50", None),
        ("gemma-scope-2b-pt-res/embedding/width_4k/x", None),
    ],
)
def test_hook_point_is_told_from_the_folders_or_must_be_named(tmp_path: Path, folder: str, hook: str | None) -> None:
    file = samples.write_npz(tmp_path / folder / "params.npz", gemma_tensors())
    if hook is not None:
        assert load_sae(file).hook_name == hook
        return
    with pytest.raises(BankError) as error:
        load_sae(file)
    assert (error.value.file, error.value.field) == (str(file), "hook_name")
    assert load_sae(file, hook_name="blocks.3.hook_resid_pre").hook_name == "blocks.3.hook_resid_pre"


def test_first_generation_transcoder(tmp_path: Path) -> None:
    t, x = gemma_tensors(d_out=D_OUT), normal(40, D_IN)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_4" / "width_16k" / "average_l0_60"
    sae = load_sae(samples.write_npz(folder / "params.npz", t))
    acts = samples.jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    torch.testing.assert_close(sae.reconstruct(x), acts @ t["W_dec"] + t["b_dec"])
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.4.hook_mlp_in", "blocks.4.hook_mlp_out")


CONFIG = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-it", "hf_hook_point_in": "model.layers.17.output"}


def write_second(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    samples.write_json(folder / "config.json", {**CONFIG, **changes})
    samples.write_safetensors(folder / "params.safetensors", tensors)
    return folder


def test_second_generation(tmp_path: Path) -> None:
    t, x = gemma_tensors(upper=False), normal(40, D_IN)
    source = read_source(write_second(tmp_path / "any", t))
    acts = samples.jump(x @ t["w_enc"] + t["b_enc"], t["threshold"])
    torch.testing.assert_close(source.sae.reconstruct(x), acts @ t["w_dec"] + t["b_dec"])
    assert (source.sae.hook_name, source.model_name) == ("blocks.17.hook_resid_post", "gemma-v3-1b-it")


def test_second_generation_without_a_configuration(tmp_path: Path) -> None:
    samples.write_safetensors(tmp_path / SECOND / "params.safetensors", gemma_tensors(upper=False))
    assert load_sae(tmp_path / SECOND).hook_name == "blocks.17.hook_resid_post"


def test_affine_skip_goes_from_input_to_output(tmp_path: Path) -> None:
    t = gemma_tensors(upper=False, d_out=D_OUT) | {"affine_skip_connection": normal(D_IN, D_OUT, seed=6)}
    hooks = {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    }
    sae, x = load_sae(write_second(tmp_path / "any", t, **hooks)), normal(40, D_IN)
    acts = samples.jump(x @ t["w_enc"] + t["b_enc"], t["threshold"])
    expected = acts @ t["w_dec"] + t["b_dec"] + x @ t["affine_skip_connection"]
    torch.testing.assert_close(sae.reconstruct(x), expected)
    assert (sae.hook_name, sae.hook_name_out) == ("blocks.5.hook_mlp_in", "blocks.5.hook_mlp_out")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architecture": "topk"}, "architecture"),
        ({"hf_hook_point_in": "model.layers.17.self_attn.o_proj.input"}, "hook_name"),
        ({"hf_hook_point_in": None}, "hook_name"),
        ({"hf_hook_point_out": "model.layers.17.self_attn.o_proj.input"}, "hook_name_out"),
    ],
)
def test_configuration_that_is_not_supported_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    folder = write_second(tmp_path / "any", gemma_tensors(upper=False), **changes)
    with pytest.raises(BankError) as error:
        load_sae(folder)
    assert error.value.field == field
    assert str(folder) in str(error.value.file)


def test_scaling_that_is_not_documented_is_refused(tmp_path: Path) -> None:
    scaled = gemma_tensors() | {"scaling_factor": torch.ones(D_SAE)}
    samples.write_npz(tmp_path / FIRST / "params.npz", scaled)
    assert load_sae(tmp_path / FIRST).d_sae == D_SAE
    samples.write_npz(tmp_path / FIRST / "params.npz", scaled | {"scaling_factor": torch.full((D_SAE,), 2.0)})
    with pytest.raises(BankError) as error:
        load_sae(tmp_path / FIRST)
    assert error.value.field == "scaling_factor"


def test_cross_layer_transcoder_is_refused_by_its_shape(tmp_path: Path) -> None:
    t = gemma_tensors(upper=False) | {"w_dec": normal(D_SAE, 3, D_IN)}
    with pytest.raises(BankError, match="shape") as error:
        load_sae(write_second(tmp_path / "any", t))
    assert error.value.field == "w_dec"

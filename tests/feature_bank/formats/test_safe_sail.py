"""A stacked Safe-SAIL checkpoint becomes SAEs that read a Qwen2's MLP output, and that do not pretend to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from feature_bank.formats.saelens import load_saelens, save_saelens
from guard.capture import truncated_forward
from tests.feature_bank.formats import samples
from tests.feature_bank.formats.samples import D_IN, D_SAE, normal, safe_sail_tensors

LAYER, STACKED, WIDTH = 1, 3, 32


def documented_encoding(t: dict[str, Tensor], index: int, x: Tensor, k: int) -> Tensor:
    """act((x - pre_encoder_bias) W^T + b) of one SAE of the stack."""
    x = x - t["pre_encoder_bias._bias_reference"][index]
    pre = torch.einsum("...d,fd->...f", x, t["encoder.weight"][index]) + t["encoder.bias"][index]
    if "encoder.theta" in t:
        return pre * (pre > t["encoder.theta"][index])
    return samples.top_k(pre.reshape(-1, D_SAE), k).reshape(pre.shape)


@pytest.fixture(scope="module")
def qwen() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize("theta", [False, True])
@pytest.mark.parametrize("index", range(STACKED))
def test_encoding_what_the_guard_captures_is_encoding_the_output_of_down_proj(
    tmp_path: Path, qwen: Any, index: int, theta: bool
) -> None:
    tensors = safe_sail_tensors(STACKED, d_in=WIDTH, theta=theta)
    tensors["encoder.weight"] *= 20  # a random model's MLP adds little
    file = samples.write_torch(tmp_path / f"ckpt_layer{LAYER}.pt", tensors)
    sae = load_sae(file, index=index, k=None if theta else 6)
    assert sae.hook_name == f"blocks.{LAYER}.hook_mlp_out"

    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    outputs = []
    module = qwen.model.layers[LAYER].mlp.down_proj
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    captured = truncated_forward(qwen, [sae.hook_name], ids)[sae.hook_name]
    handle.remove()
    assert torch.equal(captured, outputs[0])

    expected = documented_encoding(tensors, index, outputs[0], 6)
    torch.testing.assert_close(sae.encode(captured), expected, atol=1e-5, rtol=1e-5)
    fires = (expected > 0).float().mean()
    assert 0 < fires < 1


def test_a_banks_rows_can_be_cut_from_it_once_it_has_thresholds(tmp_path: Path, qwen: Any) -> None:
    file = samples.write_torch(tmp_path / f"ckpt_layer{LAYER}.pt", safe_sail_tensors(d_in=WIDTH))
    sae = load_sae(file, index=1, k=6).with_threshold(0.01)
    ids = torch.arange(12)[None]
    captured = truncated_forward(qwen, [sae.hook_name], ids)[sae.hook_name]
    torch.testing.assert_close(sae.select([4, 2]).encode(captured), sae.encode(captured)[..., [4, 2]])


def test_k_is_200_unless_told_otherwise(tmp_path: Path) -> None:
    wide = {
        "pre_encoder_bias._bias_reference": normal(1, D_IN),
        "encoder.weight": normal(1, 256, D_IN),
        "encoder.bias": normal(1, 256) + 9,
    }
    sae = load_sae(samples.write_torch(tmp_path / "ckpt_layer17.pt", wide))
    acts = sae.encode(normal(20, D_IN) * 0.1)
    assert (sae.k, sae.d_sae) == (200, 256)
    assert bool(((acts > 0).sum(1) == 200).all())


def test_the_stand_in_for_the_decoder_is_marked_and_never_decodes(tmp_path: Path) -> None:
    source = read_source(samples.write_torch(tmp_path / "ckpt_layer8.pt", safe_sail_tensors(1, theta=True)))
    sae = source.sae
    assert sae.encoder_only
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(torch.cosine_similarity(sae.W_dec, sae.W_enc.T), torch.ones(D_SAE))
    assert any("decoding is refused" in note for note in source.notes)
    assert source.model_name == "Qwen/Qwen2.5-3B-Instruct"
    with pytest.raises(BankError, match="neither reconstruct nor steer"):
        sae.reconstruct(normal(3, D_IN))
    save_saelens(sae, tmp_path / "out", model_name="tiny")
    kept = load_saelens(tmp_path / "out")
    assert kept.encoder_only
    x = normal(9, D_IN)
    assert torch.equal(kept.encode(x), sae.encode(x))
    with pytest.raises(BankError, match="neither reconstruct nor steer"):
        kept.reconstruct(x)


@pytest.mark.parametrize("index", [None, -1, STACKED])
def test_one_of_the_stack_must_be_named(tmp_path: Path, index: int | None) -> None:
    file = samples.write_torch(tmp_path / "ckpt_layer8.pt", safe_sail_tensors(STACKED))
    with pytest.raises(BankError, match="0 to 2") as error:
        load_sae(file, index=index, k=3)
    assert (error.value.file, error.value.field) == (str(file), "index")


def test_thresholds_and_k_exclude_each_other(tmp_path: Path) -> None:
    file = samples.write_torch(tmp_path / "ckpt_layer8.pt", safe_sail_tensors(1, theta=True))
    with pytest.raises(BankError) as error:
        load_sae(file, k=3)
    assert error.value.field == "k"


def test_k_above_the_width_is_refused(tmp_path: Path) -> None:
    file = samples.write_torch(tmp_path / "ckpt_layer8.pt", safe_sail_tensors(1))
    with pytest.raises(BankError, match=f"200 is not between 1 and the {D_SAE}") as error:
        load_sae(file)
    assert error.value.field == "k"


def test_negative_threshold_would_give_negative_activations_and_is_refused(tmp_path: Path) -> None:
    tensors = safe_sail_tensors(1, theta=True)
    tensors["encoder.theta"][0, 3] = -0.1
    file = samples.write_torch(tmp_path / "ckpt_layer8.pt", tensors)
    with pytest.raises(BankError) as error:
        load_sae(file)
    assert error.value.field == "encoder.theta"

"""Tiny seeded weights, and files as other projects lay them out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from feature_bank.sae import SAE

D_IN, D_SAE, D_OUT = 8, 24, 6
HOOK = "blocks.2.hook_resid_post"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).abs() * 0.4


def make_sae(kind: str, dtype: torch.dtype = torch.float32) -> SAE:
    """An SAE of each kind that can be kept: relu, jumprelu, topk, and each as (skip) transcoder."""
    transcodes, skips = "transcoder" in kind, "skip" in kind
    d_out = D_OUT if transcodes else D_IN
    threshold = positive(D_SAE, seed=4) if "jumprelu" in kind else torch.zeros(D_SAE)
    return SAE(
        W_enc=normal(D_IN, D_SAE, dtype=dtype),
        W_dec=normal(D_SAE, d_out, seed=1, dtype=dtype),
        b_enc=normal(D_SAE, seed=2, dtype=dtype),
        b_dec=normal(d_out, seed=3, dtype=dtype),
        threshold=threshold.to(dtype),
        hook_name="blocks.2.hook_mlp_in" if transcodes else HOOK,
        hook_name_out="blocks.2.hook_mlp_out" if transcodes else None,
        apply_b_dec_to_input=not transcodes,
        k=5 if "topk" in kind else None,
        W_skip=normal(D_IN, d_out, seed=5, dtype=dtype) if skips else None,
    )


def top_k(pre: Tensor, k: int) -> Tensor:
    """ReLU of the k largest of each row, spelt out."""
    kept = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        chosen = values.argsort(descending=True)[:k]
        kept[row, chosen] = values[chosen].clamp_min(0)
    return kept


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre > threshold, pre.clamp_min(0), 0.0)


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_torch(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path)
    return path


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    return path


def sparsify_tensors(*, skip: bool = False) -> dict[str, Tensor]:
    tensors = {
        "encoder.weight": normal(D_SAE, D_IN),
        "encoder.bias": normal(D_SAE, seed=1),
        "W_dec": normal(D_SAE, D_IN, seed=2),
        "b_dec": normal(D_IN, seed=3),
    }
    return tensors | ({"W_skip": normal(D_IN, D_IN, seed=4)} if skip else {})


def sparsify_config(**changes: Any) -> dict[str, Any]:
    return {
        "activation": "topk",
        "expansion_factor": D_SAE // D_IN,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 5,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
        **changes,
    }


def make_sparsify(folder: Path, *, skip: bool = False, **changes: Any) -> Path:
    write_json(folder / "cfg.json", sparsify_config(skip_connection=skip, **changes))
    write_safetensors(folder / "sae.safetensors", sparsify_tensors(skip=skip))
    return folder


def linear_tensors(*, encoder_bias: bool = True) -> dict[str, Tensor]:
    """Encoder and decoder in the layout of `nn.Linear`."""
    tensors = {"encoder.weight": normal(D_SAE, D_IN), "decoder.weight": normal(D_IN, D_SAE, seed=1)}
    return tensors | ({"encoder.bias": normal(D_SAE, seed=2)} if encoder_bias else {})


def make_dictionary(folder: Path, dict_class: str, tensors: Mapping[str, Tensor], **trainer: Any) -> Path:
    described = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "lm_name": "tiny"}
    write_json(folder / "config.json", {"trainer": {**described, "submodule_name": "resid_post_layer_2", **trainer}})
    write_torch(folder / "ae.pt", dict(tensors))
    return folder


def gemma_tensors(*, upper: bool = True, d_out: int = D_IN) -> dict[str, Tensor]:
    encoder, decoder = ("W_enc", "W_dec") if upper else ("w_enc", "w_dec")
    return {
        encoder: normal(D_IN, D_SAE),
        decoder: normal(D_SAE, d_out, seed=1),
        "b_enc": normal(D_SAE, seed=2),
        "b_dec": normal(d_out, seed=3),
        "threshold": positive(D_SAE, seed=4),
    }


def qwen_tensors() -> dict[str, Tensor]:
    return {
        "W_enc": normal(D_SAE, D_IN),
        "W_dec": normal(D_IN, D_SAE, seed=1),
        "b_enc": normal(D_SAE, seed=2),
        "b_dec": normal(D_IN, seed=3),
    }


def llama_tensors(*, linear: bool = False) -> dict[str, Tensor]:
    if linear:
        return linear_tensors() | {"decoder.bias": normal(D_IN, seed=3)}
    return {
        "W_E": normal(D_IN, D_SAE),
        "W_D": normal(D_SAE, D_IN, seed=1),
        "b_E": normal(D_SAE, seed=2),
        "b_D": normal(D_IN, seed=3),
    }


def llama_config(**changes: Any) -> dict[str, Any]:
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "use_decoder_bias": True,
        "sparsity_include_decoder_norm": False,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        **changes,
    }
    return {name: value for name, value in config.items() if value is not None}


def make_llama(folder: Path, extra: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    norm = {f"dataset_average_activation_norm.{HOOK}": torch.tensor(4.0)}
    threshold = {"log_jumprelu_threshold": positive(D_SAE, seed=4).log()}
    write_json(folder / "config.json", llama_config(**changes))
    write_safetensors(
        folder / "sae_weights.safetensors", llama_tensors() | norm | (threshold if extra is None else extra)
    )
    return folder


def safe_sail_tensors(stacked: int = 3, *, d_in: int = D_IN, theta: bool = False) -> dict[str, Tensor]:
    tensors = {
        "pre_encoder_bias._bias_reference": normal(stacked, d_in, seed=1) * 0.1,
        "encoder.weight": normal(stacked, D_SAE, d_in),
        "encoder.bias": normal(stacked, D_SAE, seed=2) * 0.1,
    }
    return tensors | ({"encoder.theta": positive(stacked, D_SAE, seed=4)} if theta else {})

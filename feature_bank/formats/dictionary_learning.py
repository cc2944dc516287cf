"""dictionary_learning: a folder with `ae.pt` and `config.json`, whose `trainer.dict_class` names the architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from feature_bank.formats.files import JsonFile, TensorFile, same_dtype
from feature_bank.formats.hook_names import choose_hook
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE, fold_gated

__all__ = ["FORMAT"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
_HINT = f"a dictionary_learning folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
_SITES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out"}


class _Parts(NamedTuple):
    """An architecture's weights in SAE's names and layout."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    subtracts: bool
    k: int | None = None
    notes: tuple[str, ...] = ()


def _linear(weights: TensorFile) -> tuple[Tensor, Tensor]:
    """Encoder (d_in, d_sae) and decoder (d_sae, d_in) from `nn.Linear` layouts."""
    encoder = weights.take("encoder.weight", ("dict_size", "activation_dim"))
    decoder = weights.take("decoder.weight", (encoder.shape[1], encoder.shape[0]))
    return encoder.T.contiguous(), decoder.T.contiguous()


def _plain(weights: TensorFile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors under SAE's own names."""
    W_enc = weights.take("W_enc", ("activation_dim", "dict_size"))
    d_in, d_sae = W_enc.shape
    return W_enc, weights.take("W_dec", (d_sae, d_in)), weights.take("b_enc", (d_sae,)), weights.take("b_dec", (d_in,))


def _relu(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec = _linear(weights)
    b_enc = weights.take("encoder.bias", (W_enc.shape[1],))
    return _Parts(W_enc, W_dec, b_enc, weights.take("bias", (W_enc.shape[0],)), torch.zeros_like(b_enc), True)


def _relu_new(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec = _linear(weights)
    b_enc = weights.take("encoder.bias", (W_enc.shape[1],))
    return _Parts(W_enc, W_dec, b_enc, weights.take("decoder.bias", (W_enc.shape[0],)), torch.zeros_like(b_enc), False)


def _gated(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec = _linear(weights)
    size = (W_enc.shape[1],)
    b_gate, b_mag, r_mag = (weights.take(name, size) for name in ("gate_bias", "mag_bias", "r_mag"))
    W_enc, b_enc, threshold = fold_gated(W_enc, b_gate, b_mag, r_mag)
    note = "The gate was folded into a JumpReLU threshold, which gives the same activations."
    return _Parts(W_enc, W_dec, b_enc, weights.take("decoder_bias", (W_enc.shape[0],)), threshold, True, notes=(note,))


def _top_k(weights: TensorFile, config: JsonFile) -> _Parts:
    W_enc, W_dec = _linear(weights)
    b_enc = weights.take("encoder.bias", (W_enc.shape[1],))
    k = _k(weights, config, W_enc.shape[1])
    weights.drop(("threshold",))  # tracked in training; its encode does not use it unless asked to
    return _Parts(W_enc, W_dec, b_enc, weights.take("b_dec", (W_enc.shape[0],)), torch.zeros_like(b_enc), True, k)


def _batch_top_k(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec = _linear(weights)
    b_enc = weights.take("encoder.bias", (W_enc.shape[1],))
    threshold = _shared_threshold(weights, b_enc)
    weights.drop(("k",))
    return _Parts(W_enc, W_dec, b_enc, weights.take("b_dec", (W_enc.shape[0],)), threshold, True)


def _matryoshka(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec, b_enc, b_dec = _plain(weights)
    threshold = _shared_threshold(weights, b_enc)
    weights.drop(("k", "group_sizes"))
    return _Parts(W_enc, W_dec, b_enc, b_dec, threshold, True)


def _jump_relu(weights: TensorFile, _: JsonFile) -> _Parts:
    W_enc, W_dec, b_enc, b_dec = _plain(weights)
    threshold = weights.take("threshold", (W_enc.shape[1],)).clamp_min(0.0)  # it cuts at zero as well
    return _Parts(W_enc, W_dec, b_enc, b_dec, threshold, False)


_CLASSES: dict[str, Callable[[TensorFile, JsonFile], _Parts]] = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
}


def _matches(path: Path) -> bool:
    return (path / WEIGHTS_FILE).exists() if path.is_dir() else path.name == WEIGHTS_FILE


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    folder = path.parent if path.name == WEIGHTS_FILE else path
    config = JsonFile(folder / CONFIG_FILE, hint=_HINT)
    dict_class = config.need("trainer.dict_class", str)
    if dict_class not in _CLASSES:
        raise config.error(
            "trainer.dict_class", f"{dict_class!r} is not supported; known are {', '.join(sorted(_CLASSES))}"
        )
    weights = TensorFile.torch(folder / WEIGHTS_FILE)
    parts = _CLASSES[dict_class](weights, config)
    weights.finish()
    config.expect("trainer.activation_dim", parts.W_enc.shape[0])
    config.expect("trainer.dict_size", parts.W_enc.shape[1])
    W_enc, W_dec, b_enc, b_dec, threshold = same_dtype(*parts[:5])
    return LoadedSAE(
        sae=SAE(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=b_enc,
            b_dec=b_dec,
            threshold=threshold,
            hook_name=choose_hook(options, _hook(config), config.path, "trainer.submodule_name and trainer.layer"),
            apply_b_dec_to_input=parts.subtracts,
            k=parts.k,
        ),
        format=FORMAT.name,
        weights=weights.path,
        model_name=options.model_name or config.get("trainer.lm_name", str),
        notes=parts.notes,
    )


def _hook(config: JsonFile) -> str | None:
    """`resid_post_layer_8` or `mlp_out_layer_3`; without a name the submodule is the block, as its trainers have it."""
    layer = config.get("trainer.layer", int)
    name = config.get("trainer.submodule_name", str)
    if name is None:
        return None if layer is None else f"blocks.{layer}.hook_resid_post"
    match = re.fullmatch(r"(\w+?)_layer_(\d+)", name)
    if match is None or match[1] not in _SITES:
        return None
    if layer is not None and layer != int(match[2]):
        raise config.error("trainer.layer", f"{layer} is not that of trainer.submodule_name, {name!r}")
    return f"blocks.{match[2]}.{_SITES[match[1]]}"


def _k(weights: TensorFile, config: JsonFile, d_sae: int) -> int:
    """How many features fire: the file's, if it has it, and the configuration's, which must agree."""
    stated = config.get("trainer.k", int)
    k = int(weights.take_number("k")) if "k" in weights else stated
    if k is None:
        raise config.error("trainer.k", "missing")
    if stated not in (None, k):
        raise config.error("trainer.k", f"{stated} is not that of the weights, {k}")
    if not 1 <= k <= d_sae:
        raise config.error("trainer.k", f"{k} is not between 1 and the {d_sae} features")
    return k


def _shared_threshold(weights: TensorFile, b_enc: Tensor) -> Tensor:
    """One threshold for all features; it is below zero until training has set it, and then ReLU cuts."""
    if "threshold" not in weights:
        raise weights.error(
            "threshold", "the tensor is missing; without it an activation depends on the batch, and cannot be kept"
        )
    return torch.full_like(b_enc, max(weights.take_number("threshold"), 0.0))


FORMAT = Format(name="dictionary_learning", matches=_matches, read=_read)

"""Llama Scope and other SAEs of OpenMOSS' Language-Model-SAEs: `config.json` or `hyperparams.json`, and weights.

The weights (`sae_weights.safetensors` with `W_E, W_D, b_E, b_D`, or with `encoder.weight` and so on, which
`checkpoints/final.safetensors` has too) work on activations of mean length sqrt(d_model):
    z = (s x) W_E + b_E,  y = a W_D / s_out + b_D / s_out,  s = sqrt(d_model) / dataset_average_activation_norm
so s is folded in. Where `sparsity_include_decoder_norm` is set, z is compared with the threshold (and ranked) times
the norm of its decoder row.
A `log_jumprelu_threshold` is in the units of z; the older scalar `jump_relu_threshold` is in those of the raw
activations, and so is s times smaller.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from feature_bank.formats.files import JsonFile, TensorFile, same_dtype
from feature_bank.formats.folding import fold_decoder_norm, fold_scales, widen
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMAT"]

_CONFIGS = ("config.json", "hyperparams.json")
_WEIGHTS = ("sae_weights.safetensors", "checkpoints/final.safetensors")
_HINT = "a Llama Scope folder holds config.json or hyperparams.json, and the weights"
_NORM = "dataset_average_activation_norm"
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _config(folder: Path) -> Path | None:
    return next((folder / name for name in _CONFIGS if (folder / name).exists()), None)


def _matches(path: Path) -> bool:
    folder = _folder(path)
    if (folder / "cfg.json").exists() or _config(folder) is None:
        return False
    if path.is_dir():
        return any((path / name).exists() for name in _WEIGHTS)
    return path.name in ("sae_weights.safetensors", "final.safetensors")


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    folder = _folder(path)
    config = JsonFile(_config(folder) or folder / _CONFIGS[0], hint=_HINT)
    file = (
        path if path.is_file() else next((folder / n for n in _WEIGHTS if (folder / n).exists()), folder / _WEIGHTS[0])
    )
    for field in ("use_glu_encoder", "use_glu"):
        if config.get(field, bool, False):
            raise config.error(field, "an encoder with a gated linear unit is not supported")
    weights = TensorFile.safetensors(file, hint=_HINT)
    hook_name = options.hook_name or config.need("hook_point_in", str, "name it with hook_name")
    hook_out = options.hook_name_out or config.get("hook_point_out", str)
    transcodes = hook_out is not None and hook_out != config.get("hook_point_in", str)
    W_enc, W_dec, b_enc, b_dec = _weights(config, weights)
    scale_in, scale_out = _scales(config, weights, W_enc.shape[0], W_dec.shape[1])
    act_fn = config.need("act_fn", str).lower()
    includes_norm = config.get("sparsity_include_decoder_norm", bool, False)
    norm = widen(W_dec).norm(dim=1) if includes_norm else torch.ones_like(widen(b_enc))
    k = None
    threshold = torch.zeros_like(norm)
    if act_fn == "jumprelu":
        threshold = _threshold(config, weights, norm, scale_in, scale_out)
    elif act_fn == "topk":
        k = config.need("top_k", int)
        if not 1 <= k <= norm.shape[0]:
            raise config.error("top_k", f"{k} is not between 1 and the {norm.shape[0]} features")
        if includes_norm:
            W_enc, b_enc, W_dec = fold_decoder_norm(W_enc, b_enc, W_dec)
    elif act_fn != "relu":
        raise config.error("act_fn", f"{act_fn!r} is not supported; relu, jumprelu and topk are")
    weights.finish()
    W_enc, W_dec, b_enc, b_dec, threshold = same_dtype(W_enc, W_dec, b_enc, b_dec, threshold)
    subtracts = config.get("apply_decoder_bias_to_pre_encoder", bool, False)
    if subtracts and transcodes:
        raise config.error("apply_decoder_bias_to_pre_encoder", "true is not possible for a transcoder")
    sae = SAE(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=threshold,
        hook_name=hook_name,
        hook_name_out=hook_out if transcodes else None,
        apply_b_dec_to_input=subtracts,
        k=k,
    )
    if scale_in != 1.0 or scale_out != 1.0:
        sae = fold_scales(sae, scale_in, scale_out)
        notes: tuple[str, ...] = (f"The scale of the training's activations, {scale_in:g}, was folded in.",)
    else:
        notes = ()
    return LoadedSAE(
        sae=sae,
        format=FORMAT.name,
        weights=file,
        model_name=options.model_name or config.get("model_name", str),
        notes=notes,
    )


def _weights(config: JsonFile, weights: TensorFile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder, decoder and biases under either set of names; sizes must be those of the configuration."""
    linear = "encoder.weight" in weights
    names = (
        ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias") if linear else ("W_E", "W_D", "b_E", "b_D")
    )
    W_enc = weights.take(names[0], ("d_sae", "d_model") if linear else ("d_model", "d_sae"))
    W_enc = W_enc.T.contiguous() if linear else W_enc
    d_model, d_sae = W_enc.shape
    W_dec = weights.take(names[1], (d_model, d_sae) if linear else (d_sae, d_model))
    W_dec = W_dec.T.contiguous() if linear else W_dec
    b_enc = weights.take(names[2], (d_sae,))
    if config.get("use_decoder_bias", bool, True):
        b_dec = weights.take(names[3], (d_model,))
    else:
        b_dec = torch.zeros(d_model, dtype=W_dec.dtype)
    config.expect("d_model", d_model)
    stated = config.get("d_sae", int)
    expansion = config.get("expansion_factor", (int, float))
    if stated is None and expansion is not None and expansion * d_model != d_sae:
        raise config.error("expansion_factor", f"{expansion} is not that of the weights, {d_sae / d_model:g}")
    config.expect("d_sae", d_sae)
    return W_enc, W_dec, b_enc, b_dec


def _scales(config: JsonFile, weights: TensorFile, d_in: int, d_out: int) -> tuple[float, float]:
    """What activations were multiplied by before the encoder, and the output's target likewise."""
    stored = {
        name.removeprefix(f"{_NORM}."): weights.take_number(name)
        for name in weights.names
        if name.startswith(f"{_NORM}.")
    }
    stated = config.get(_NORM, dict, {})
    norms = {**stated, **stored}
    mode = config.get("norm_activation", str, "dataset-wise" if norms else None)
    if mode == "inference":
        return 1.0, 1.0
    if mode != "dataset-wise":
        remedy = "it depends on each token, so it cannot be folded" if mode else "missing"
        raise config.error("norm_activation", f"{mode!r} is not supported; {remedy}")
    scales = []
    for side, width in (("in", d_in), ("out", d_out)):
        hook = config.get(f"hook_point_{side}", str) or config.get("hook_point_in", str)
        norm = norms.get(hook, norms.get(side))
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < math.inf:
            raise config.error(_NORM, f"{norm!r} is no positive length for {side!r}; the weights need it")
        scales.append(math.sqrt(width) / norm)
    return scales[0], scales[1]


def _threshold(config: JsonFile, weights: TensorFile, norm: Tensor, scale_in: float, scale_out: float) -> Tensor:
    """The thresholds on z."""
    for name in _THRESHOLDS:
        if name in weights:
            return widen(weights.take(name, tuple(norm.shape))).exp() / _nonzero(norm)
    scalar = config.need("jump_relu_threshold", (int, float))
    if not 0 <= scalar < math.inf:
        raise config.error("jump_relu_threshold", f"{scalar!r} is no threshold")
    if scale_in != scale_out:
        raise config.error(
            "jump_relu_threshold",
            "the units of a transcoder's scalar threshold are not documented; a threshold per feature is read",
        )
    return torch.full_like(norm, scalar * scale_in) / _nonzero(norm)


def _nonzero(norm: Tensor) -> Tensor:
    """Norms to divide by: a feature whose decoder row is zero adds nothing, whatever its threshold."""
    return torch.where(norm > 0, norm, 1.0)


FORMAT = Format(name="llama_scope", matches=_matches, read=_read, options=frozenset({"hook_name_out"}))

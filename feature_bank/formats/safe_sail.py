"""Safe-SAIL: `ckpt_layer{L}.pt`, several SAEs of the output of a layer's `mlp.down_proj`, stacked along axis 0.

encode: act((x - pre_encoder_bias) W^T + b), where act is JumpReLU if the file has `encoder.theta`, else TopK (k = 200)
and then ReLU. The published files hold encoders only. Such an SAE can monitor; in the place of a decoder it gets the
encoder's directions at unit length, is marked `encoder_only`, and refuses to decode.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from feature_bank.errors import BankError
from feature_bank.formats.files import LayerFiles, TensorFile, same_dtype
from feature_bank.formats.folding import widen
from feature_bank.formats.hook_names import choose_hook
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMAT", "MODEL", "K"]

K = 200
MODEL = "Qwen/Qwen2.5-3B-Instruct"
_FILES = LayerFiles("ckpt_layerN.pt")
_PRE_BIAS, _WEIGHT, _BIAS, _THETA = (
    "pre_encoder_bias._bias_reference",
    "encoder.weight",
    "encoder.bias",
    "encoder.theta",
)


class _Encoder(NamedTuple):
    """One SAE of the stack."""

    weight: Tensor
    """(d_sae, d_in)"""
    bias: Tensor
    pre_bias: Tensor
    theta: Tensor | None
    note: str


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    path = _FILES.only(path)
    encoder = _take(path, options.index)
    d_sae = encoder.weight.shape[0]
    k = None
    if encoder.theta is None:
        k = K if options.k is None else options.k
        if not 1 <= k <= d_sae:
            raise BankError(f"{k} is not between 1 and the {d_sae} features", file=str(path), field="k")
    elif options.k is not None:
        raise BankError("the file has thresholds (encoder.theta), so no k applies", file=str(path), field="k")
    norm = widen(encoder.weight).norm(dim=1, keepdim=True)
    stand_in = (widen(encoder.weight) / torch.where(norm > 0, norm, 1.0)).to(encoder.weight.dtype)
    layer = _FILES.layer(path)
    return LoadedSAE(
        sae=SAE(
            W_enc=encoder.weight.T.contiguous(),
            W_dec=stand_in,
            b_enc=encoder.bias,
            b_dec=encoder.pre_bias,
            threshold=torch.zeros_like(encoder.bias) if encoder.theta is None else encoder.theta,
            # TransformerLens' hook_mlp_out is what the MLP adds to the stream: the output of down_proj.
            hook_name=choose_hook(
                options, f"blocks.{layer}.hook_mlp_out" if layer is not None else None, path, "the file's name"
            ),
            apply_b_dec_to_input=True,
            k=k,
            encoder_only=True,
        ),
        format=FORMAT.name,
        weights=path,
        model_name=options.model_name or MODEL,
        notes=(
            encoder.note,
            "Only the encoder was published: the decoder rows are stand-ins, and decoding is refused.",
        ),
    )


def _take(path: Path, index: int | None) -> _Encoder:
    weights = TensorFile.torch(path)
    weight = weights.take(_WEIGHT, ("model_index", "d_sae", "d_in"))
    stacked, d_sae, d_in = weight.shape
    bias = weights.take(_BIAS, (stacked, d_sae))
    pre_bias = weights.take(_PRE_BIAS, (stacked, d_in))
    theta = weights.take(_THETA, (stacked, d_sae)) if _THETA in weights else None
    weights.finish()
    if index is None:
        if stacked > 1:
            raise BankError(
                f"{stacked} SAEs are stacked in it; give the one to take as index, 0 to {stacked - 1}",
                file=str(path),
                field="index",
            )
        index = 0
    if not 0 <= index < stacked:
        raise BankError(f"{index} is not one of the stacked SAEs, 0 to {stacked - 1}", file=str(path), field="index")
    chosen = same_dtype(*(t[index].clone() for t in (weight, bias, pre_bias, theta) if t is not None))
    if theta is not None and bool((chosen[3] < 0).any()):
        # x * 1[x > theta] without a ReLU would be negative there, which SAE's activations never are.
        raise weights.error(_THETA, "a threshold is negative")
    note = f"SAE {index} of {stacked} that are stacked in the file."
    return _Encoder(chosen[0], chosen[1], chosen[2], chosen[3] if theta is not None else None, note)


FORMAT = Format(name="safe_sail", matches=_FILES.matches, read=_read, options=frozenset({"index", "k"}))

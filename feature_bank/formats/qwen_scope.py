"""Qwen-Scope: `layer{n}.sae.pt`, a TopK SAE of the output of a decoder layer.

encode: the k largest of x W_enc^T + b_enc, then ReLU; b_dec is not subtracted. How many features fire stands only in
the repository's name (`SAE-Res-MODEL-W32K-L0_50`).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from feature_bank.errors import BankError
from feature_bank.formats.files import LayerFiles, TensorFile, same_dtype
from feature_bank.formats.hook_names import choose_hook
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMAT"]

_FILES = LayerFiles("layerN.sae.pt")
_REPOSITORY = re.compile(r"SAE-Res-(?P<model>.+)-W\d+K-L0_(?P<k>\d+)")


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    path = _FILES.only(path)
    weights = TensorFile.torch(path)
    encoder = weights.take("W_enc", ("d_sae", "d_model"))
    d_sae, d_model = encoder.shape
    W_enc, W_dec, b_enc, b_dec = same_dtype(
        encoder.T.contiguous(),
        weights.take("W_dec", (d_model, d_sae)).T.contiguous(),
        weights.take("b_enc", (d_sae,)),
        weights.take("b_dec", (d_model,)),
    )
    weights.finish()
    k, model_name = _origin(path, options)
    if not 1 <= k <= d_sae:
        raise BankError(f"{k} is not between 1 and the {d_sae} features", file=str(path), field="k")
    layer = _FILES.layer(path)
    found = f"blocks.{layer}.hook_resid_post" if layer is not None else None
    return LoadedSAE(
        sae=SAE(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=b_enc,
            b_dec=b_dec,
            threshold=torch.zeros_like(b_enc),
            hook_name=choose_hook(options, found, path, "the file's name"),
            apply_b_dec_to_input=False,
            k=k,
        ),
        format=FORMAT.name,
        weights=path,
        model_name=options.model_name or model_name,
    )


def _origin(path: Path, options: SourceOptions) -> tuple[int, str | None]:
    """`k` and the model, from the caller or from a folder that is named as the repository is."""
    for part in reversed(path.absolute().parts):
        match = _REPOSITORY.search(part)
        if match is not None:
            return options.k if options.k is not None else int(match["k"]), f"Qwen/{match['model']}"
    if options.k is None:
        raise BankError(
            "how many features fire stands only in the repository's name (...-L0_50); give it as k",
            file=str(path),
            field="k",
        )
    return options.k, None


FORMAT = Format(name="qwen_scope", matches=_FILES.matches, read=_read, options=frozenset({"k"}))

"""Folding into the weights what other projects do around them, without changing what comes out.

What is folded is computed and kept in float32 at least, so that a bfloat16 file loses nothing more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.sae import SAE

__all__ = ["fold_decoder_norm", "fold_scales", "widen"]


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fold_decoder_norm(
    W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, " d_sae"], W_dec: Float[Tensor, "d_sae d_out"]
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"], Float[Tensor, "d_sae d_out"]]:
    """Encoder and decoder with unit decoder rows: activations come out multiplied by the rows' norms.

    So an SAE that ranks or thresholds z * |W_dec| and decodes with W_dec / |W_dec| is written plainly.
    A row of zeros stays one, and its feature gets a pre-activation of zero.
    """
    norm = widen(W_dec).norm(dim=1)
    safe = torch.where(norm > 0, norm, 1.0)
    return widen(W_enc) * norm, widen(b_enc) * norm, widen(W_dec) / safe[:, None]


def fold_scales(sae: SAE, scale_in: float, scale_out: float) -> SAE:
    """The SAE on raw activations, given one trained on x * scale_in that predicts y * scale_out.

    Activations keep the units that they had in training.
    """
    return replace(
        sae,
        W_enc=widen(sae.W_enc) * scale_in,
        W_dec=widen(sae.W_dec) / scale_out,
        b_enc=widen(sae.b_enc),
        b_dec=widen(sae.b_dec) / scale_out,
        threshold=widen(sae.threshold),
        W_skip=None if sae.W_skip is None else widen(sae.W_skip) * (scale_in / scale_out),
    )

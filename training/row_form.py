"""The rows of an SAE as a bank keeps them: each feature with a threshold of its own, and how well they stand for it.

A feature of a TopK SAE fires if it is among the k largest of a token, which rows alone cannot tell. Its threshold is
the value that it exceeds on as many tokens of the sample as it fires on. It is fitted on every second token, and how
often rows and SAE agree is measured on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from feature_bank.sae import SAE

__all__ = ["RowForm", "row_form"]

_SAMPLE_TOKENS = 100_000
_CHUNK_VALUES = 2**23  # feature activations held at a time: 32 MB


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """An SAE of which the chosen features can be computed one by one, and figures of the whole on the sample."""

    sae: SAE
    """In JumpReLU form; thresholds of features that were not chosen mean nothing if the source is a TopK SAE."""
    l0: float
    dead_fraction: float
    """Share of the features that fire on no token of the sample."""
    fvu: float
    """Fraction of variance unexplained; 1 for an SAE without a decoder, which explains none."""
    fires_precision: float
    fires_recall: float
    """Of "fires" by the rows against the SAE itself, over the chosen features. Both 1 if none fires either way."""


def row_form(sae: SAE, activations: Float[Tensor, "tokens d_in"], features: Sequence[int]) -> RowForm:
    """Give `features` thresholds that stand for the SAE, from an evenly spaced sample of at most 100,000 tokens."""
    x = activations[:: -(-activations.shape[0] // _SAMPLE_TOKENS)]
    chosen = torch.as_tensor(list(features), dtype=torch.long)
    weight, bias = sae.folded_encoder()
    weight, bias = weight[:, chosen].float(), bias[chosen].float()
    step = max(1, _CHUNK_VALUES // sae.d_sae)
    fired = torch.zeros(sae.d_sae, dtype=torch.long)
    pre, fires = [], []
    centre = x.double().mean(0)
    residual = total = 0.0
    for start in range(0, x.shape[0], step):
        part = x[start : start + step].to(sae.W_enc.dtype)
        acts = sae.encode(part)
        fired += (acts > 0).sum(0)
        fires.append(acts[:, chosen] > 0)
        pre.append(part.float() @ weight + bias)
        if not sae.encoder_only:
            residual += float((part.double() - sae.reconstruct(part).double()).square().sum())
            total += float((part.double() - centre).square().sum())
    known, values = torch.cat(fires), torch.cat(pre)
    if sae.k is None:
        form, threshold = sae, sae.threshold[chosen].float()
    else:
        threshold = _matching(values[::2], known[::2]).clamp_min(sae.threshold[chosen].float())
        every = torch.zeros(sae.d_sae, dtype=sae.threshold.dtype)
        every[chosen] = threshold.to(every.dtype)
        form = sae.with_threshold(every)
    held_out = slice(None) if sae.k is None or x.shape[0] < 2 else slice(1, None, 2)
    called, true = values[held_out] > threshold, known[held_out]
    both = int((called & true).sum())
    return RowForm(
        sae=form,
        l0=float(fired.sum()) / x.shape[0],
        dead_fraction=float((fired == 0).float().mean()),
        fvu=1.0 if sae.encoder_only or total == 0 else residual / total,
        fires_precision=_share(both, int(called.sum())),
        fires_recall=_share(both, int(true.sum())),
    )


def _matching(pre: Float[Tensor, "tokens f"], fires: Bool[Tensor, "tokens f"]) -> Float[Tensor, " f"]:
    """Per feature the value, zero or above, that as many tokens exceed as it fires on (ties aside)."""
    ordered = pre.sort(dim=0, descending=True).values
    count = fires.sum(0)
    last = ordered.gather(0, (count - 1).clamp_min(0)[None])[0]
    following = ordered.gather(0, count.clamp_max(pre.shape[0] - 1)[None])[0]
    middle = torch.where(count == pre.shape[0], last - last.abs() * 1e-3, (last + following) / 2)
    return torch.where(count == 0, ordered[0], middle).clamp_min(0.0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0

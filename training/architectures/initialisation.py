"""Where training starts: the data's scale and centre, and a dictionary of random directions."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import DataError

Centre = Literal["mean", "geometric_median"]
_MEDIAN_ROWS = 8192
_MEDIAN_STEPS = 100


def data_norm(sample: Float[Tensor, "n d"]) -> float:
    """The root mean squared length over sqrt(d): divided by it, a coordinate's mean square is 1.

    Raises DataError for a sample that is empty, all zero, or holds NaN or infinity.
    """
    if sample.dim() != 2 or not sample.numel():
        raise DataError(f"the sample has shape {tuple(sample.shape)}; rows of activations are needed")
    norm = float(sample.pow(2).sum(1).mean().sqrt() / math.sqrt(sample.shape[1]))
    if not math.isfinite(norm):
        raise DataError("the sample holds NaN or infinity; harvest again")
    if norm == 0.0:
        raise DataError("every activation of the sample is zero: is the hook point right?")
    return norm


def centre_of(sample: Float[Tensor, "n d"], kind: Centre) -> Float[Tensor, " d"]:
    """The mean, or the point with the least sum of distances to the rows (Weiszfeld's iteration)."""
    centre = sample.mean(0)
    if kind == "mean":
        return centre
    rows = sample[:: max(1, sample.shape[0] // _MEDIAN_ROWS)]
    for _ in range(_MEDIAN_STEPS):
        weights = 1 / torch.linalg.vector_norm(rows - centre, dim=1).clamp_min(1e-6)
        moved = weights @ rows / weights.sum()
        step = float(torch.linalg.vector_norm(moved - centre))
        centre = moved
        if step <= 1e-6 * float(torch.linalg.vector_norm(centre)):
            break
    return centre


def unit_rows(rows: int, width: int, *, seed: int, like: Tensor) -> Float[Tensor, "rows width"]:
    """Random directions, the same on every device."""
    found = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    found /= torch.linalg.vector_norm(found, dim=1, keepdim=True)
    return found.to(like)

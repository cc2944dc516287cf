"""Random directions of the residual stream: what explaining and scoring make of what nobody learnt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 8192
_QUANTILE = 0.999
_LARGEST = 6e4  # of half precision


@torch.inference_mode()
def random_directions(
    activations: Float[Tensor, "tokens d_in"], density: npt.NDArray[np.floating], *, seed: int
) -> npt.NDArray[np.float16]:
    """(tokens, n) normalised activations of n random unit vectors, in the form that features' activations have.

    Each is the projection on the direction where it exceeds a threshold, and zero elsewhere; the threshold lets it fire
    on as many tokens as a feature does, and what exceeds the mean is divided by its own 99.9th percentile.

    density: (n,) the share of tokens on which each shall fire, above 0: those of the features that it stands beside.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(activations.shape[1], len(density), generator=generator)
    directions /= directions.norm(dim=0)
    found = np.empty((activations.shape[0], len(density)), dtype=np.float16)
    mean = activations.mean(0, dtype=torch.float32)
    for start in range(0, activations.shape[0], _CHUNK):
        projected = (activations[start : start + _CHUNK].float() - mean) @ directions
        found[start : start + _CHUNK] = projected.clamp_(-_LARGEST, _LARGEST).numpy()
    for i, share in enumerate(density.tolist()):
        column = found[:, i].astype(np.float32)
        threshold, scale = np.quantile(column, (1 - min(share, 1.0), _QUANTILE))
        fired = np.where((column > threshold) & (column > 0), column, 0.0)
        if scale <= 0 or (fired > 0).mean() < 1 - _QUANTILE:
            scale = max(float(fired.max(initial=0.0)), 1e-6)
        found[:, i] = fired / scale
    return found

"""Feature activations of a whole SAE over a harvest: scales, densities, agreement, and one pooled row a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from feature_bank.atomic import atomic_file
from feature_bank.sae import SAE
from feature_bank.schema import Pooling
from training.shards import write_safetensors

CHUNK = 8192
QUANTILES = (0.5, 0.9, 0.99)
_SAMPLE_TOKENS = 100_000


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Per feature of one SAE over a sample of the corpus."""

    scale: npt.NDArray[np.float32]
    """99.9th percentile of the activation over all tokens; where that is 0, the largest activation seen (never 0)."""
    density: npt.NDArray[np.float32]
    """Share of tokens on which it fires."""


def chunks(activations: Float[Tensor, "tokens d_in"]) -> Iterator[Float[Tensor, "chunk d_in"]]:
    """The rows in order, some thousands at a time, in full precision."""
    for start in range(0, activations.shape[0], CHUNK):
        yield activations[start : start + CHUNK].float()


def feature_stats(sae: SAE, activations: Float[Tensor, "tokens d_in"], *, block: int = 512) -> FeatureStats:
    """Scales and densities from an evenly spaced sample of at most 100,000 tokens."""
    sample = activations[:: -(-activations.shape[0] // _SAMPLE_TOKENS)].float()
    tokens = sample.shape[0]
    rank = max(1, round(tokens * 0.001))
    weight, bias, threshold = sae.rows()
    scale, density = [], []
    for start in range(0, sae.d_sae, block):
        part = slice(start, start + block)
        pre = weight[:, part].T @ sample.T + bias[part, None]  # features by rows: each row's top is found in place
        acts = torch.where(pre > threshold[part, None], pre, 0.0)
        top = acts.topk(rank, dim=1, sorted=False).values
        percentile, largest = top.amin(1), top.amax(1)
        scale.append(torch.where(percentile > 0, percentile, torch.where(largest > 0, largest, 1.0)))
        density.append((acts > 0).float().mean(1))
    return FeatureStats(scale=torch.cat(scale).numpy(), density=torch.cat(density).numpy())


def batch_topk_agreement(
    sae: SAE, activations: Float[Tensor, "tokens d_in"], features: list[int], k: int, *, batches: int = 12
) -> tuple[float, float]:
    """(precision, recall) of "fires" for `features`: JumpReLU rows against the BatchTopK rule on batches of tokens.

    Both are 1 where there are no features.
    """
    if not features:
        return 1.0, 1.0
    chosen = torch.tensor(features)
    true = called = both = 0
    step = max(CHUNK, activations.shape[0] // batches)
    for start in range(0, activations.shape[0], step):
        x = activations[start : start + CHUNK // 4].float()
        weight, bias, threshold = sae.rows()
        pre = torch.addmm(bias, x, weight).relu()
        cut = pre.flatten().kthvalue(max(1, pre.numel() - k * x.shape[0] + 1)).values
        full = pre[:, chosen] >= cut.clamp_min(1e-12)
        rows = pre[:, chosen] > threshold[chosen]
        true, called, both = true + int(full.sum()), called + int(rows.sum()), both + int((full & rows).sum())
    return both / max(called, 1), both / max(true, 1)


def pool_documents(
    sae: SAE,
    activations: Float[Tensor, "tokens d_in"],
    documents: npt.NDArray[np.int64],
    n_documents: int,
    scale: npt.NDArray[np.float32],
    pooling: Pooling,
) -> npt.NDArray[np.float16]:
    """(n_documents, d_sae): for every document the mean of its clipped, normalised activations, as the heads read it.

    documents: the document of every row; rows of a document are consecutive. Documents without rows give zeros.
    """
    pooled = torch.zeros(n_documents, sae.d_sae)
    count = torch.from_numpy(np.bincount(documents, minlength=n_documents))
    weight, bias, threshold = sae.rows()
    divisor = torch.from_numpy(scale)
    start = 0
    for chunk in chunks(activations):
        pre = torch.addmm(bias, chunk, weight)
        acts = torch.where(pre > threshold, pre, 0.0).div_(divisor).clamp_max_(pooling.ceiling)
        pooled.index_add_(0, torch.from_numpy(documents[start : start + chunk.shape[0]]), acts)
        start += chunk.shape[0]
    pooled /= count.clamp_min(pooling.min_tokens)[:, None]
    result: npt.NDArray[np.float16] = pooled.numpy().astype(np.float16)
    return result


def encode_tokens(
    sae: SAE, activations: Float[Tensor, "tokens d_in"], features: list[int], scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.float16]:
    """(tokens, len(features)) normalised activations of selected features; half precision, for there are many."""
    part = sae.select(features)
    divisor = torch.from_numpy(scale[features])
    encoded = np.empty((activations.shape[0], len(features)), dtype=np.float16)
    start = 0
    for chunk in chunks(activations):
        encoded[start : start + chunk.shape[0]] = (part.encode(chunk) / divisor).clamp_max_(6e4).numpy()
        start += chunk.shape[0]
    return encoded


def cached_pooling(
    sae: SAE,
    activations: Callable[[], Float[Tensor, "tokens d_in"]],
    documents: npt.NDArray[np.int64],
    n_documents: int,
    pooling: Pooling,
    *,
    path: Path,
    fingerprint: str,
) -> tuple[FeatureStats, npt.NDArray[np.float16]]:
    """`feature_stats` and `pool_documents`, kept in `path`; made anew if that file has another fingerprint."""
    made_of = json.dumps([fingerprint, pooling.model_dump(include={"min_tokens", "ceiling"})])
    if path.exists():
        with suppress(SafetensorError), safe_open(path, framework="np") as tensors:
            if (tensors.metadata() or {}).get("made_of") == made_of:
                stats = FeatureStats(scale=tensors.get_tensor("scale"), density=tensors.get_tensor("density"))
                return stats, tensors.get_tensor("pooled")
    loaded = activations()
    stats = feature_stats(sae, loaded)
    pooled = pool_documents(sae, loaded, documents, n_documents, stats.scale, pooling)
    kept = {"scale": stats.scale, "density": stats.density, "pooled": pooled}
    with atomic_file(path) as tmp, tmp.open("wb") as file:
        write_safetensors(file, {name: torch.from_numpy(array) for name, array in kept.items()}, {"made_of": made_of})
    return stats, pooled

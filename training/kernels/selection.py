"""Which features are active: the k largest of each row, or the k times batch largest of a batch, without sorting.

On CPU the work is numpy's: its selection, comparison and search for set flags are several times torch's speed. What
is returned is exact on every path; bounds and guesses only decide how much is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from training.kernels.sparse import SparseActs
from training.replicas import ALONE, Replicas

_GROUPS_PER_K = 4  # the maxima of 4k groups bound the k-th largest so well that about 5 % too many entries pass
_SAMPLED_ROWS = 64


def kth_largest(values: Float[Tensor, "... n"], k: int) -> Float[Tensor, "... 1"]:
    """The k-th largest value of each row, 1 <= k <= n."""
    n = values.shape[-1]
    if values.device.type != "cpu":
        return values.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    found = np.partition(values.numpy(), n - k, axis=-1)[..., n - k : n - k + 1]
    return torch.from_numpy(np.ascontiguousarray(found))


def keep_above(pre: Float[Tensor, "batch d_sae"], threshold: float | Float[Tensor, "batch 1"]) -> SparseActs:
    """The positive entries of `pre` that are at least `threshold`, a number or one for each row."""
    batch, d_sae = pre.shape
    floor = torch.as_tensor(threshold, dtype=pre.dtype, device=pre.device)
    if pre.device.type == "cpu":
        smallest = np.nextafter(np.zeros(1, pre.numpy().dtype), 1)
        flat = np.flatnonzero(pre.numpy() >= np.maximum(floor.numpy(), smallest))
        rows = flat // d_sae
        kept, row_index = torch.from_numpy(flat), torch.from_numpy(rows)
    else:
        kept = torch.nonzero(((pre >= floor) & (pre > 0)).flatten()).squeeze(1)
        row_index = kept // d_sae
    return SparseActs(
        rows=row_index,
        cols=kept - row_index * d_sae,
        values=pre.reshape(-1).index_select(0, kept),
        shape=(batch, d_sae),
    )


def topk_rows(pre: Float[Tensor, "batch d_sae"], k: int) -> SparseActs:
    """The k largest entries of each row, as far as they are positive; 1 <= k <= d_sae."""
    batch, d_sae = pre.shape
    if pre.device.type != "cpu":
        cols = pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        values = pre.gather(1, cols)
        rows = torch.arange(batch, device=pre.device)[:, None].expand_as(cols)
        found = SparseActs(rows.flatten(), cols.flatten(), values.flatten(), (batch, d_sae))
        return found.where(found.values > 0)
    # At least k entries of a row reach the k-th largest of the maxima of disjoint groups. Strided groups let the
    # maxima be taken over whole vectors.
    groups = _GROUPS_PER_K * k
    size = d_sae // groups
    bounded = pre if size < 2 else pre[:, : size * groups].reshape(batch, size, groups).amax(1)
    return _trim(keep_above(pre, kth_largest(bounded, k)), k)


def _trim(acts: SparseActs, k: int) -> SparseActs:
    """The k largest entries of each row, of equal ones any; on CPU."""
    starts = acts.row_starts().numpy()
    counts = np.diff(starts)
    most = int(counts.max(initial=0))
    if most <= k:
        return acts
    rows, values = acts.rows.numpy(), acts.values.numpy()
    places = np.arange(len(rows)) - starts[rows]
    padded: NDArray[np.floating] = np.full((acts.shape[0], most), -np.inf, values.dtype)
    padded[rows, places] = values
    cut = np.partition(padded, most - k, axis=1)[:, most - k]
    keep = values >= cut[rows]
    if int(keep.sum()) > int(np.minimum(counts, k).sum()):  # equal values at the cut
        chosen = np.zeros(padded.shape, dtype=bool)
        np.put_along_axis(chosen, np.argpartition(padded, most - k, axis=1)[:, most - k :], True, axis=1)
        keep = chosen[rows, places]
    return acts.where(torch.from_numpy(keep))


def batch_topk(
    chunks: Callable[[], Iterable[Float[Tensor, "rows d_sae"]]],
    k: int,
    batch: int,
    *,
    guess: float = 0.0,
    replicas: Replicas = ALONE,
) -> tuple[SparseActs, float]:
    """The `k * batch` largest entries of a batch as far as they are positive, and the smallest of them.

    chunks: gives the pre-activations, some rows at a time; called again only if the first bound was too high.
    guess: a bound worth trying (the previous step's threshold, relaxed); without one it comes from a sample of rows.
    The threshold is 0.0 if fewer than `k * batch` entries are positive. Entries equal to it are all kept.
    replicas: who has the `batch` rows; of the entries, those in the rows that are here are given.
    """
    wanted = k * batch
    for bound in (guess, None, 0.0) if guess > 0 else (None, 0.0):
        floor, parts = bound, []
        for pre in chunks():
            floor = replicas.least(_sampled_floor(pre, k)) if floor is None else floor
            parts.append(keep_above(pre, floor))
        acts = SparseActs.stack(parts)
        values = replicas.gather(acts.values)
        if values.numel() >= wanted:
            cut = kth_largest(values, wanted)
            return acts.where(acts.values >= cut), float(cut)
        if floor == 0.0:
            break
    return acts, 0.0


def _sampled_floor(pre: Float[Tensor, "rows d_sae"], k: int) -> float:
    """A value that about 2k entries a row exceed, never negative."""
    some = pre[:: max(1, pre.shape[0] // _SAMPLED_ROWS)]
    rank = min(2 * k * some.shape[0], some.numel())
    return max(0.0, float(kth_largest(some.reshape(-1), rank)))


def batch_topk_threshold(pre: Float[Tensor, "batch d_sae"], k: int, *, guess: float = 0.0) -> float:
    """The value that keeps exactly `k * batch` positive pre-activations (ties aside), found without sorting the batch.

    Returns 0.0 if fewer are positive. `guess` as in `batch_topk`; it changes the time, never the result.
    """
    return batch_topk(lambda: [pre], k, pre.shape[0], guess=guess)[1]

"""Attention-sink outliers: a few positions whose activations are many times longer than all others.

One of them in a batch would be its loss, so they are found when a harvest ends, counted, and left out by readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from training.batches import OUTLIER_FACTOR
from training.cache import OUTLIERS, SUMMARY, HookSummary, ShardSummary, Summary, run_id, shard_path
from training.shards import TOKEN, length_name, open_shard, write_safetensors, written


def summarise(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Find the outliers of the whole cache, and write them and the summary. Holds one shard's lengths at a time."""
    run, block_rows = run_id(manifest), manifest["block_rows"]
    paths = [shard_path(folder, number) for number in range(manifest["shards"])]
    hook_points, outliers, shards = {}, {}, []

    def lengths(name: str) -> Iterator[npt.NDArray[np.float32]]:
        for number, path in enumerate(paths):
            with open_shard(path, run, number, block_rows) as shard:
                found = shard.rows(length_name(name), 0, shard.shape(length_name(name))[0])
                yield found.numpy().copy()

    for name in manifest["hook_names"]:
        median = exact_median(lambda name=name: lengths(name))  # type: ignore[misc]  # a default binds the name
        first, parts = 0, []
        for part in lengths(name):
            parts.append(first + np.flatnonzero(part > OUTLIER_FACTOR * median))
            first += len(part)
        outliers[name] = torch.from_numpy(np.concatenate(parts))
        with open_shard(paths[0], run, 0, block_rows) as shard:
            d_in = shard.shape(name)[1]
        hook_points[name] = HookSummary(d_in=d_in, median_length=median, outliers=len(outliers[name]))
    for number, path in enumerate(paths):
        with open_shard(path, run, number, block_rows) as shard:
            shards.append(ShardSummary(rows=shard.shape(TOKEN)[0], bytes=path.stat().st_size))
    with written(folder / OUTLIERS) as file:
        write_safetensors(file, outliers, {})
    with written(folder / SUMMARY) as file:
        summary = Summary(run=run, hook_points=hook_points, shards=shards)
        file.write(summary.model_dump_json(indent=1).encode() + b"\n")


def exact_median(parts: Callable[[], Iterator[npt.NDArray[np.float32]]]) -> float:
    """The lower median of numbers that are not negative, in two passes and constant memory.

    As integers the bits of such floats have the floats' order: the first pass counts by the upper 16 bits, the second
    by the lower 16 bits where the upper ones are the median's.
    """
    upper = np.zeros(1 << 16, dtype=np.int64)
    for part in parts():
        upper += np.bincount(part.view(np.uint32) >> 16, minlength=1 << 16)
    rank = (int(upper.sum()) - 1) // 2
    high = int(np.searchsorted(np.cumsum(upper), rank, side="right"))
    rank -= int(upper[:high].sum())
    lower = np.zeros(1 << 16, dtype=np.int64)
    for part in parts():
        bits = part.view(np.uint32)
        lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low = int(np.searchsorted(np.cumsum(lower), rank, side="right"))
    return float(np.array((high << 16) | low, dtype=np.uint32).view(np.float32))

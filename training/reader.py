"""Batches from a cache of any size, shuffled by a seed, in bounded memory.

A pass visits the cache in windows. A window is as many blocks of consecutive rows as half the memory holds, drawn at
random from the whole cache; its rows are shuffled among themselves and cut into batches, while the next window is read.
Which rows a batch holds is a function of the seed and the number of the step, so a run can start at any step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import DataError
from training.cache import Harvest, IntArray

BLOCK_TOKENS = 256
MEMORY_BYTES = 1 << 30
_SAMPLE_BLOCKS = 512  # a sample reads no more blocks than these, however large the cache is


class _Window(NamedTuple):
    """Some blocks in memory, and the order in which their rows are used."""

    epoch: int
    rows: Mapping[str, Float[Tensor, "rows d_in"]]
    order: IntArray


class _Request(NamedTuple):
    """A window that is to be read: its blocks, and how many rows of it are passed over."""

    epoch: int
    number: int
    blocks: IntArray
    skip: int


@dataclass(frozen=True)
class _Blocks:
    """Runs of consecutive rows of one shard each; those without a usable row are not listed."""

    shard: IntArray
    start: IntArray
    stop: IntArray
    """Rows within the shard."""
    usable: IntArray
    """How many of the rows may be used."""
    rank: IntArray = field(init=False)
    """(blocks + 1,) usable rows before each block."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", np.concatenate([[0], np.cumsum(self.usable)]))

    def __len__(self) -> int:
        return len(self.shard)


class ActivationReader:
    """Shuffled batches of a harvest, the same token in row i at every hook point.

    hook_names: which hook points; rows that are outliers at any of them are left out at all of them. batch_tokens: rows
    of a batch. block_tokens: consecutive rows that are read together, rounded up to whole blocks of the cache.
    memory_bytes: bound of what is held at a time, besides the batches that were handed out and some 60 bytes a block
    for the list of blocks. keep: (tokens,) rows that may be used at all, for example those of some documents.
    prefetch: read the next window in a thread while this one is used; it does not change the order.

    Raises DataError for a hook point that was not harvested, fewer rows than one batch, or a memory bound that one
    block and one batch exceed.
    """

    def __init__(
        self,
        harvest: Harvest,
        hook_names: Sequence[str],
        *,
        batch_tokens: int,
        seed: int = 0,
        block_tokens: int = BLOCK_TOKENS,
        memory_bytes: int = MEMORY_BYTES,
        keep: npt.NDArray[np.bool_] | None = None,
        prefetch: bool = True,
    ) -> None:
        if not hook_names:
            raise DataError("no hook point is named, so there is nothing to read")
        if batch_tokens < 1 or block_tokens < 1 or seed < 0:
            raise DataError(
                f"batch_tokens {batch_tokens}, block_tokens {block_tokens} and seed {seed}: the first two must be at "
                "least 1, the seed at least 0"
            )
        self.hook_names = tuple(dict.fromkeys(hook_names))
        self.batch_tokens = batch_tokens
        self._harvest = harvest
        self._seed = seed
        self._prefetch = prefetch
        self._width = {name: harvest.d_in(name) for name in self.hook_names}
        self._block_tokens = -(-block_tokens // harvest.block_rows) * harvest.block_rows
        self._excluded = self._outliers()
        self.outliers = len(self._excluded)
        """Rows left out because they are outliers at one of the hook points."""
        self._keep = self._usable_mask(keep)
        self._blocks = self._list_blocks()
        self.tokens = int(self._blocks.rank[-1])
        """Usable rows."""
        self.steps_per_epoch = self.tokens // batch_tokens
        if self.steps_per_epoch < 1:
            raise DataError(
                f"{self.tokens} activations at {', '.join(self.hook_names)} are fewer than one batch of "
                f"{batch_tokens}; give more text"
            )
        self._windows, self.buffer_bytes = self._plan(memory_bytes)

    @property
    def d_in(self) -> Mapping[str, int]:
        """The width of every hook point."""
        return dict(self._width)

    @property
    def files(self) -> Sequence[Path]:
        """The shards of the cache."""
        return self._harvest.shards

    @property
    def order(self) -> Mapping[str, Any]:
        """What decides which rows a batch holds, as JSON. A run may be resumed on a reader with the same order."""
        return {
            "shuffle": "blocks",
            "cache": self._harvest.summary.run,
            "hook_names": list(self.hook_names),
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "block_tokens": self._block_tokens,
            "windows": self._windows,
            "seed": self._seed,
        }

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Float[Tensor, "batch d_in"]]]:
        """The batches from `start_step` on, float32 on the CPU, pass after pass without end.

        In each pass a usable row comes at most once, and only the rows of the last, incomplete batch do not come.
        Close the iterator (or drop it) to end its thread. Raises DataError naming the shard that is damaged.
        """
        windows = self._read_windows(start_step)
        try:
            filled, epoch = 0, -1
            for window in windows:
                if window.epoch != epoch:
                    filled, epoch = 0, window.epoch  # the incomplete batch of the last pass is dropped
                at = 0
                while at < len(window.order):
                    if not filled:
                        batch = {name: torch.empty(self.batch_tokens, width) for name, width in self._width.items()}
                    taken = min(self.batch_tokens - filled, len(window.order) - at)
                    index = torch.from_numpy(window.order[at : at + taken])
                    for name, rows in window.rows.items():
                        batch[name][filled : filled + taken].copy_(rows.index_select(0, index))
                    at, filled = at + taken, filled + taken
                    if filled == self.batch_tokens:
                        filled = 0
                        yield batch
        finally:
            windows.close()

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d_in"]]:
        """`n` usable rows (all, if there are fewer) spread evenly over the cache, float32, the same in each call.

        Of a large cache they are the rows of up to 512 blocks.
        """
        count = min(len(self._blocks), _SAMPLE_BLOCKS)
        chosen = np.arange(count) * len(self._blocks) // count
        rank = np.concatenate([[0], np.cumsum(self._blocks.usable[chosen])])
        n = min(n, int(rank[-1]))
        wanted = np.arange(n) * int(rank[-1]) // max(n, 1)
        found = {name: torch.empty(n, width) for name, width in self._width.items()}
        bounds = np.searchsorted(wanted, rank)
        for at, block in enumerate(chosen.tolist()):
            first, last = bounds[at], bounds[at + 1]
            if first == last:
                continue
            with self._harvest.shard(int(self._blocks.shard[block])) as shard:
                index = torch.from_numpy(self._usable_rows(block)[wanted[first:last] - rank[at]])
                for name, rows in found.items():
                    stored = shard.rows(name, int(self._blocks.start[block]), int(self._blocks.stop[block]))
                    rows[first:last] = stored.index_select(0, index)
        return found

    # ---- which rows ------------------------------------------------------------------------------------------

    def _outliers(self) -> IntArray:
        return np.unique(np.concatenate([self._harvest.outliers(name) for name in self.hook_names]))

    def _usable_mask(self, keep: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.bool_] | None:
        if keep is None:
            return None
        if keep.shape != (self._harvest.tokens,):
            raise DataError(f"'keep' has the shape {keep.shape}, but the cache has {self._harvest.tokens} rows")
        usable = keep.astype(bool)
        usable[self._excluded] = False
        return usable

    def _list_blocks(self) -> _Blocks:
        rows, size = self._harvest.shard_rows, self._block_tokens
        counts = -(-rows // size)
        shard = np.repeat(np.arange(len(rows)), counts)
        start = (np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        stop = np.minimum(start + size, rows[shard])
        first = np.repeat(np.cumsum(rows) - rows, counts) + start  # as rows of the whole cache
        if self._keep is None:
            usable = stop - start - np.diff(np.searchsorted(self._excluded, np.append(first, rows.sum())))
        else:
            usable = np.add.reduceat(self._keep, first, dtype=np.int64)
        listed = usable > 0
        self._first = first[listed]
        return _Blocks(shard[listed], start[listed], stop[listed], usable[listed])

    def _usable_rows(self, block: int) -> IntArray:
        """The usable rows of a block, counted from its start."""
        first, length = int(self._first[block]), int(self._blocks.stop[block] - self._blocks.start[block])
        if self._keep is not None:
            return np.flatnonzero(self._keep[first : first + length])
        low, high = np.searchsorted(self._excluded, [first, first + length])
        return np.delete(np.arange(length), self._excluded[low:high] - first)

    # ---- windows ---------------------------------------------------------------------------------------------

    def _plan(self, memory_bytes: int) -> tuple[int, int]:
        """How many windows a pass has, and the bytes that are held at most."""
        width = sum(self._width.values())
        batch = self.batch_tokens * (
            4 * width + 2 * max(self._width.values())
        )  # float32, and bfloat16 of one hook point
        block = self._block_tokens * (2 * width + 8)
        whole = self.tokens * (2 * width + 8)
        if whole + batch <= memory_bytes:
            return 1, whole + batch
        fits = (memory_bytes - batch) // (2 * block)  # two windows, though one is enough without prefetch: same order
        if fits < 1:
            raise DataError(
                f"memory_bytes is {memory_bytes:,}, but one batch and two blocks take {batch + 2 * block:,}; "
                "raise it, or make batches or blocks smaller"
            )
        windows = -(-len(self._blocks) // fits)
        return windows, batch + 2 * block * -(-len(self._blocks) // windows)

    def _requests(self, start_step: int) -> Iterator[_Request]:
        epoch, step = divmod(start_step, self.steps_per_epoch)
        skip = step * self.batch_tokens
        while True:
            mixed = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._blocks))
            for number, blocks in enumerate(np.array_split(mixed, self._windows)):
                rows = int(self._blocks.usable[blocks].sum())
                if skip < rows:
                    yield _Request(epoch, number, np.sort(blocks), skip)
                skip = max(0, skip - rows)
            epoch, skip = epoch + 1, 0

    def _read_windows(self, start_step: int) -> Generator[_Window, None, None]:
        """Windows one after the other; with `prefetch` the next is read while the last one handed out is used."""
        most = min(-(-len(self._blocks) // self._windows) * self._block_tokens, self.tokens)
        held = 2 if self._prefetch and self._windows > 1 else 1
        buffers = [
            {name: torch.empty(most, width, dtype=torch.bfloat16) for name, width in self._width.items()}
            for _ in range(held)
        ]
        requests = enumerate(self._requests(start_step))
        loaded = False

        def read() -> _Window:
            nonlocal loaded
            turn, request = next(requests)
            buffer = buffers[turn % held]
            if not loaded:
                self._fill(buffer, request.blocks)
                loaded = self._windows == 1  # a cache that fits is read once
            rows = int(self._blocks.usable[request.blocks].sum())
            shuffled = np.random.default_rng([self._seed, request.epoch, 1 + request.number]).permutation(rows)
            return _Window(request.epoch, {n: b[:rows] for n, b in buffer.items()}, shuffled[request.skip :])

        if held == 1:
            while True:
                yield read()
        with ThreadPoolExecutor(1, thread_name_prefix="sailguard-reader") as ahead:
            following = ahead.submit(read)
            while True:
                window = following.result()
                following = ahead.submit(read)
                yield window

    def _fill(self, buffer: Mapping[str, Tensor], blocks: IntArray) -> None:
        """Copy the usable rows of blocks, which are in rising order, to the beginning of a buffer."""
        at = 0
        shards = self._blocks.shard[blocks]
        for number in np.unique(shards).tolist():
            with self._harvest.shard(number) as shard:
                for block in blocks[shards == number].tolist():
                    index = torch.from_numpy(self._usable_rows(block))
                    start, stop = int(self._blocks.start[block]), int(self._blocks.stop[block])
                    for name, rows in buffer.items():
                        stored = shard.rows(name, start, stop)
                        target = rows[at : at + len(index)]
                        if len(index) == stop - start:
                            target.copy_(stored)
                        else:
                            torch.index_select(stored, 0, index, out=target)
                    at += len(index)

"""Where the trainer's batches come from: what it asks of a reader, activations in memory, and reading ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from feature_bank.errors import DataError

OUTLIER_FACTOR = 8.0
Batch = dict[str, Tensor]
"""hook_name -> (batch, d_in) float32 on the CPU; row i is the same token at every hook point."""


class Reader(Protocol):
    """What the trainer needs of a source of activations."""

    @property
    def tokens(self) -> int:
        """Usable rows."""

    @property
    def batch_tokens(self) -> int:
        """Rows of a batch."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass."""

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hook points of each batch."""

    @property
    def order(self) -> Mapping[str, Any]:
        """What decides which rows a batch holds, as JSON: the seed and the way of shuffling."""

    @property
    def files(self) -> Sequence[Path]:
        """What it reads while batches are made; a copy of it elsewhere has to see the same."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches from `start_step` on, pass after pass; batch s is the same whatever the start."""

    def sample(self, n: int) -> Batch:
        """About `n` rows, spread evenly over the data, the same in each call."""


def inliers(activations: Float[Tensor, "tokens d_in"]) -> Bool[Tensor, " tokens"]:
    """Which rows are not attention-sink outliers: those up to eight times the median length.

    A few positions carry activations a hundred times longer than all others; one of them in a batch would be its loss.
    Raises DataError for NaN or infinity.
    """
    length = torch.cat([part.float().norm(dim=1) for part in torch.split(activations, 65_536)])
    if not bool(torch.isfinite(length).all()):  # one NaN makes the median NaN, and no row would be left
        raise DataError("the activations hold NaN or infinity")
    return length <= OUTLIER_FACTOR * length.median()


class TensorReader:
    """A reader over activations that fit in memory: every pass is a seeded shuffle of all rows.

    activations: by hook point (tokens, d_in), any floating dtype, one row a token. Rows that are outliers at any hook
    point are left out.

    Raises DataError for NaN, infinity, or numbers of rows that differ.
    """

    def __init__(
        self, activations: Mapping[str, Float[Tensor, "tokens d_in"]], *, batch_tokens: int, seed: int = 0
    ) -> None:
        counts = {name: len(rows) for name, rows in activations.items()}
        if len(set(counts.values())) != 1:
            raise DataError(f"the hook points have different numbers of rows: {counts}")
        keep = None
        for name, rows in activations.items():
            try:
                kept = inliers(rows)
            except DataError as e:
                raise DataError(f"{name}: {e}; harvest again") from e
            keep = kept if keep is None else keep & kept
        self._activations = {name: rows[keep] for name, rows in activations.items()}
        self._seed = seed
        self.hook_names = tuple(activations)
        self.tokens = len(next(iter(self._activations.values())))
        self.batch_tokens = batch_tokens
        self.order = {"shuffle": "all rows", "seed": seed}
        self.files: Sequence[Path] = ()
        self.steps_per_epoch = self.tokens // batch_tokens

    def batches(self, start_step: int) -> Iterator[Batch]:
        """The batches from `start_step` on, without end."""
        step, order, epoch = start_step, torch.empty(0, dtype=torch.long), -1
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator().manual_seed(self._seed * 1009 + epoch)
                order = torch.randperm(self.tokens, generator=generator)
            first = (step % self.steps_per_epoch) * self.batch_tokens
            chosen = order[first : first + self.batch_tokens]
            yield {name: rows[chosen].float() for name, rows in self._activations.items()}
            step += 1

    def sample(self, n: int) -> Batch:
        """At least `n` rows if there are as many, evenly spread."""
        return {name: rows[:: max(1, self.tokens // n)].float() for name, rows in self._activations.items()}


def checked(batches: Iterator[Batch], first_step: int) -> Iterator[Batch]:
    """The same batches. Raises DataError, naming hook point and step, for one with NaN or infinity."""
    for step, batch in enumerate(batches, first_step):
        for name, rows in batch.items():
            if not bool(rows.sum().isfinite()):  # a sum shows both, and makes no tensor of the batch's size
                raise DataError(f"{name}: the activations of step {step} hold NaN or infinity; harvest again")
        yield batch


@contextmanager
def read_ahead(batches: Iterator[Batch], depth: int, *, pin: bool = False) -> Iterator[Iterator[Batch]]:
    """Yield the same batches, up to `depth` of them read before they are asked for, in a thread of its own.

    pin: put them in page-locked memory, from which an accelerator copies while it computes. With depth 0 there is no
    thread. An exception of the source is raised where the batch that failed is asked for.
    """
    if depth == 0:
        yield batches
        return
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                put({name: rows.pin_memory() for name, rows in batch.items()} if pin else batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as e:  # noqa: BLE001  # it is raised again in the thread that trains
            put(e)

    def received() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, name="sailguard-read-ahead", daemon=True)
    thread.start()
    try:
        yield received()
    finally:
        stopped.set()
        thread.join()

"""Activations of a corpus at several hook points, from one truncated forward pass, into shards on disk.

A shard covers a fixed list of documents and is written atomically; a run that was stopped goes on with the first
missing shard, so an interruption costs at most the two shards in work (one computed, one being written), and the bytes
of the shards do not depend on interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from feature_bank.errors import DataError
from feature_bank.identity import weights_digest
from guard.capture import length_batches, pad_batch, truncated_forward
from training.cache import (
    FORMAT,
    MANIFEST,
    OUTLIERS,
    SUMMARY,
    Harvest,
    IntArray,
    open_harvest,
    read_manifest,
    run_id,
    shard_path,
)
from training.corpus import TokenSequence
from training.outliers import summarise
from training.shards import DOCUMENT, TOKEN, length_name, open_shard, write_shard, written

__all__ = ["MANIFEST", "Harvest", "ShardMaker", "harvest", "open_harvest", "plan_shards"]

BLOCK_ROWS = 256
CPU_BATCH_TOKENS, ACCELERATOR_BATCH_TOKENS = 2048, 16_384


class Survey(NamedTuple):
    """What one pass over the sequences tells."""

    lengths: IntArray
    """(sequences,) tokens the model reads."""
    rows: IntArray
    """(sequences,) tokens whose activations are kept."""
    documents: IntArray
    special: int
    """Special tokens, which are not kept."""
    sha256: str


def survey(sequences: Sequence[TokenSequence]) -> Survey:
    """Count and hash the sequences. Raises DataError if there is none, or a document comes twice."""
    if not sequences:
        raise DataError("no text gives a token to harvest; give more text")
    digest = hashlib.sha256()
    counted = np.empty((len(sequences), 3), dtype=np.int64)
    special = 0
    for index, s in enumerate(sequences):
        counted[index] = len(s.ids), len(s.positions), s.document
        special += s.special
        digest.update(np.asarray([s.document, len(s.ids), *s.ids], dtype=np.int64).tobytes())
        digest.update(s.positions.tobytes())
    lengths, rows, documents = counted.T
    found, times = np.unique(documents, return_counts=True)
    if (times > 1).any():
        raise DataError(f"document {found[times > 1][0]} comes more than once; a document is one sequence")
    return Survey(lengths, rows, documents, special, digest.hexdigest())


def plan_shards(lengths: IntArray, documents: IntArray, *, shard_tokens: int) -> list[IntArray]:
    """Sequences (as indices) by length, cut into shards of about `shard_tokens` tokens each."""
    order = np.lexsort((documents, lengths))
    shards: list[IntArray] = []
    start = filled = 0
    for place, length in enumerate(lengths[order].tolist(), 1):
        filled += length
        if filled >= shard_tokens or place == len(order):
            shards.append(order[start:place])
            start, filled = place, 0
    return shards


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """How the shards of one harvest are made: whoever has it, the model and a shard's sequences can make that shard.

    A shard's bytes depend on nothing else, so it does not matter who makes it, when, or how often.
    """

    folder: Path
    run: str
    """The harvest that the shards name in their headers."""
    hook_names: tuple[str, ...]
    batch_tokens: int
    block_rows: int

    def has(self, number: int, rows: int) -> bool:
        """Whether a shard of so many rows is on disk. Raises DataError if it is cut short, damaged or another one."""
        path = shard_path(self.folder, number)
        if not path.exists():
            return False
        with open_shard(path, self.run, number, self.block_rows) as shard:
            for name in (*self.hook_names, DOCUMENT, TOKEN, *map(length_name, self.hook_names)):
                if shard.shape(name)[0] != rows:
                    raise DataError(
                        f"{path}, field {name!r}: {shard.shape(name)[0]} rows, {rows} were expected; remove it"
                    )
        return True

    def capture(self, model: Any, members: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """The tensors of a shard. Raises DataError naming the document whose activation is not finite."""
        return _capture(model, members, self.hook_names, self.batch_tokens)

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Put a shard on disk. Raises DataError naming the file if it cannot be written."""
        path = shard_path(self.folder, number)
        write_shard(path, tensors, run=self.run, number=number, block_rows=self.block_rows)


Missing = Iterable[tuple[int, list[TokenSequence]]]
"""The numbers of the shards that are to be made, with their sequences; not in memory until asked for."""
MakeShards = Callable[[Any, ShardMaker, Missing], Generator[int]]
"""make(model, maker, missing): make these shards, and yield the number of each when it is on disk, in any order."""


def make_here(model: Any, maker: ShardMaker, missing: Missing) -> Generator[int]:
    """Make shards one after the other in this process; one is written while the next is computed."""
    pending: tuple[int, Future[None]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="sailguard-harvest") as writer:  # an error waits for it, too
        for number, members in missing:
            tensors = maker.capture(model, members)
            if pending is not None:
                pending[1].result()
                yield pending[0]
            pending = number, writer.submit(maker.write, number, tensors)
        if pending is not None:
            pending[1].result()
            yield pending[0]


def harvest(
    model: Any,
    sequences: Sequence[TokenSequence],
    hook_names: Sequence[str],
    folder: Path,
    *,
    fingerprint: dict[str, Any],
    shard_tokens: int = 16_384,
    batch_tokens: int | None = None,
    block_rows: int = BLOCK_ROWS,
    on_shard: Callable[[int, int, int], None] | None = None,
    make: MakeShards = make_here,
) -> Harvest:
    """Capture `hook_names` on all sequences into `folder`, resuming what is there.

    fingerprint: what the activations depend on besides the sequences and the weights (model, tokenizer, layout).
    batch_tokens: padded tokens of a forward pass; by default 2,048 on a CPU and 16,384 on an accelerator. block_rows:
    rows that share a checksum. on_shard(done, total, tokens) is called when a shard is on disk. make: who makes the
    shards that are missing; by default this process.

    Raises DataError if there is no sequence, a document comes twice, the folder holds another harvest or a damaged
    shard, another process is harvesting into it, an activation is not finite, or the disk is full. What was finished
    stays.
    """
    counted = survey(sequences)
    plan = plan_shards(counted.lengths, counted.documents, shard_tokens=shard_tokens)
    weight = next(model.parameters())
    if batch_tokens is None:
        batch_tokens = CPU_BATCH_TOKENS if weight.device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **fingerprint,
        "weights": weights_digest(model),
        "computed_in": str(weight.dtype).removeprefix("torch."),
        "stored_in": "bfloat16",
        "hook_names": list(hook_names),
        "shard_tokens": shard_tokens,
        "batch_tokens": batch_tokens,
        "block_rows": block_rows,
        "sequences": counted.sha256,
        "documents": len(sequences),
        "tokens": int(counted.lengths.sum()),
        "rows": int(counted.rows.sum()),
        "special_tokens": counted.special,
        "shards": len(plan),
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read back
    names = tuple(hook_names)
    maker = ShardMaker(
        folder=folder, run=run_id(manifest), hook_names=names, batch_tokens=batch_tokens, block_rows=block_rows
    )
    done = tokens = 0

    def count(number: int) -> None:
        nonlocal done, tokens
        done, tokens = done + 1, tokens + int(counted.lengths[plan[number]].sum())
        if on_shard is not None:
            on_shard(done, len(plan), tokens)

    with _claimed(folder, manifest):
        missing = []
        for number, members in enumerate(plan):
            if maker.has(number, int(counted.rows[members].sum())):
                count(number)
            else:
                missing.append(number)
        if missing:
            work = ((number, [sequences[i] for i in plan[number].tolist()]) for number in missing)
            with closing(make(model, maker, work)) as made:  # whatever ends this, nothing writes on after the claim
                for number in made:
                    count(number)
            _clear(folder)
        if missing or not (folder / SUMMARY).exists():
            summarise(folder, manifest)
    return open_harvest(folder)


def _capture(
    model: Any, members: Sequence[TokenSequence], hook_names: Sequence[str], batch_tokens: int
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    device = next(model.parameters()).device
    rows = sum(len(s.positions) for s in members)
    kept: dict[str, Tensor] = {}
    lengths = {name: torch.empty(rows, device=device) for name in hook_names}
    start = 0
    # Members come sorted by length, so that a batch is the next ones
    for places in length_batches([len(s.ids) for s in members], batch_tokens):
        batch = [members[place] for place in places]
        # No mask: padding stands on the right, where a causal model's earlier positions cannot see it
        ids, _ = pad_batch([s.ids for s in batch], 0, device)
        hidden = truncated_forward(model, hook_names, ids)
        flat = np.concatenate([s.positions + row * ids.shape[1] for row, s in enumerate(batch)])
        index = torch.from_numpy(flat).to(device)
        stop = start + len(flat)
        for name in hook_names:
            x = hidden[name]
            if name not in kept:
                kept[name] = torch.empty(rows, x.shape[-1], dtype=torch.bfloat16, device=device)
            stored = kept[name][start:stop]
            stored.copy_(x.reshape(-1, x.shape[-1]).index_select(0, index))
            lengths[name][start:stop] = stored.float().norm(dim=1)
        start = stop
    tensors = {name: tensor.cpu() for name, tensor in kept.items()}  # once a shard: an accelerator waits for nothing
    documents = np.repeat([s.document for s in members], [len(s.positions) for s in members])
    tensors[DOCUMENT] = torch.from_numpy(documents.astype(np.int32))
    tokens = np.concatenate([np.asarray(s.ids, dtype=np.int32)[s.positions] for s in members])
    tensors[TOKEN] = torch.from_numpy(tokens)
    for name in hook_names:
        length = tensors[length_name(name)] = lengths[name].cpu()
        if not bool(torch.isfinite(length).all()):  # any value of the row that is not finite makes it so
            bad = documents[int(torch.nonzero(~torch.isfinite(length))[0])]
            raise DataError(
                f"the model gave NaN or infinity at {name} (document {bad}); check the model's weights and dtype"
            )
    return tensors


@contextmanager
def _claimed(folder: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Hold the folder: write the manifest or check the one there, and clear away what a killed run left.

    Raises DataError if the folder belongs to another harvest, or to another process now.
    """
    path = folder / MANIFEST
    if not path.exists():
        with written(path) as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    found = read_manifest(path)
    for field in (*manifest, *found):
        if found.get(field) != manifest.get(field):
            raise DataError(
                f"{path}, field {field!r}: the cached activations come from other text, settings or another model; "
                f"remove {folder} or use another work folder"
            )
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError as e:
            raise DataError(f"{folder}: another process is harvesting into it; wait for it or stop it") from e
        _clear(folder)
        yield


def _clear(folder: Path) -> None:
    """Remove what was left half written. Only the holder of the folder may call this."""
    for name in ("shard-*", MANIFEST, OUTLIERS, SUMMARY):
        for leftover in folder.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)

"""Activations on disk: the finished cache as a whole.

A cache is a folder:

    harvest.json          the manifest: model, weights, tokenizer, hook points, text, layout; written first
    shard-00000.safetensors ...   rows of a fixed list of documents; each is written atomically
    outliers.safetensors  per hook point the numbers of the rows that are attention-sink outliers
    summary.json          rows, sizes and counts; written last, so a cache without it is not finished
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from feature_bank.errors import DataError
from training.shards import DOCUMENT, REMEDY, TOKEN, Shard, open_shard

MANIFEST = "harvest.json"
SUMMARY = "summary.json"
OUTLIERS = "outliers.safetensors"
FORMAT = "sailguard activations 1"
IntArray = npt.NDArray[np.int64]


class ShardSummary(BaseModel):
    """A shard as the summary lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rows: int
    bytes: int


class HookSummary(BaseModel):
    """What is known of a hook point's rows as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    d_in: int
    median_length: float
    outliers: int
    """Rows longer than eight times the median: attention sinks, which readers leave out."""


class Summary(BaseModel):
    """`summary.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    run: str
    """sha256 of the manifest that it belongs to."""
    hook_points: dict[str, HookSummary]
    shards: list[ShardSummary]


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """A finished cache. Token rows lie in shard order; documents are indices into the corpus.

    Nothing of the size of the cache is in memory until it is asked for.
    """

    folder: Path
    hook_names: tuple[str, ...]
    shards: tuple[Path, ...]
    manifest: Mapping[str, Any] = field(repr=False)
    summary: Summary = field(repr=False)

    @property
    def block_rows(self) -> int:
        """Rows that share a checksum; what is read is read in whole blocks."""
        return int(self.manifest["block_rows"])

    @cached_property
    def shard_rows(self) -> IntArray:
        """(shards,) the rows of every shard."""
        return np.array([shard.rows for shard in self.summary.shards], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Rows of the whole cache, outliers included."""
        return int(self.shard_rows.sum())

    @cached_property
    def documents(self) -> IntArray:
        """(tokens,) the document of every row; a document's rows are consecutive and in order."""
        return self._column(DOCUMENT)

    @cached_property
    def token_ids(self) -> IntArray:
        """(tokens,) the token of every row."""
        return self._column(TOKEN)

    def d_in(self, hook_name: str) -> int:
        """The width of a hook point. Raises DataError for one that was not harvested."""
        return self._hook(hook_name).d_in

    def activations(self, hook_name: str) -> Float[Tensor, "tokens d_in"]:
        """All activations of one hook point, outliers included, bfloat16, in memory: 2 * tokens * d_in bytes.

        Raises DataError for a hook point that was not harvested, or naming the shard that is damaged.
        """
        found = torch.empty(self.tokens, self.d_in(hook_name), dtype=torch.bfloat16)
        start = 0
        for number, rows in enumerate(self.shard_rows.tolist()):
            with self.shard(number) as shard:
                for first in range(0, rows, self.block_rows):
                    block = shard.rows(hook_name, first, min(rows, first + self.block_rows))
                    found[start : start + len(block)] = block
                    start += len(block)
        return found

    def outliers(self, hook_name: str) -> IntArray:
        """The numbers of the rows that are outliers at a hook point, rising. Raises DataError for a damaged file."""
        path, expected = self.folder / OUTLIERS, self._hook(hook_name).outliers
        try:
            with safe_open(path, framework="np") as tensors:
                found: IntArray = tensors.get_tensor(hook_name)
        except (SafetensorError, OSError) as e:
            raise DataError(f"{path}, field {hook_name!r}: damaged ({e}); {REMEDY}") from e
        if len(found) != expected:
            raise DataError(f"{path}, field {hook_name!r}: {len(found)} rows where {SUMMARY} has {expected}; {REMEDY}")
        return found

    @contextmanager
    def shard(self, number: int) -> Iterator[Shard]:
        """Open one shard; its memory map lives as long as the context and the tensors taken from it."""
        with open_shard(self.shards[number], self.summary.run, number, self.block_rows) as shard:
            for name in self.hook_names:
                expected = (self.summary.shards[number].rows, self.summary.hook_points[name].d_in)
                if shard.shape(name) != expected:
                    raise DataError(
                        f"{shard.path}, field {name!r}: the shape is {shard.shape(name)}, {SUMMARY} has {expected}; "
                        f"{REMEDY}"
                    )
            yield shard

    def _hook(self, hook_name: str) -> HookSummary:
        try:
            return self.summary.hook_points[hook_name]
        except KeyError:
            raise DataError(
                f"{self.folder / MANIFEST}, field 'hook_names': {hook_name!r} was not harvested; "
                f"there are {', '.join(self.hook_names)}"
            ) from None

    def _column(self, name: str) -> IntArray:
        parts = []
        for number, rows in enumerate(self.shard_rows.tolist()):
            with self.shard(number) as shard:
                parts.append(shard.rows(name, 0, rows).numpy().astype(np.int64))
        return np.concatenate(parts)


def run_id(manifest: Mapping[str, Any]) -> str:
    """The hash by which shards and summary name the manifest that they belong to."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def open_harvest(folder: Path) -> Harvest:
    """A finished cache, read back. Raises DataError naming the file and field that is missing or damaged."""
    manifest = read_manifest(folder / MANIFEST)
    path = folder / SUMMARY
    if not path.exists():
        raise DataError(f"{path} is missing: the harvest in {folder} was not finished; run it again to go on")
    try:
        summary = Summary.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as e:
        place = ".".join(map(str, e.errors()[0]["loc"])) if isinstance(e, ValidationError) else ""
        raise DataError(f"{path}{f', field {place!r}' if place else ''}: damaged; {REMEDY}") from e
    if summary.run != run_id(manifest) or list(summary.hook_points) != manifest["hook_names"]:
        raise DataError(f"{path}, field 'run': it belongs to another manifest than {MANIFEST}; {REMEDY}")
    shards = tuple(shard_path(folder, number) for number in range(len(summary.shards)))
    for shard, expected in zip(shards, summary.shards, strict=True):
        found = shard.stat().st_size if shard.exists() else 0
        if found != expected.bytes:
            state = f"a damaged shard of {found} bytes" if found else "missing or empty"
            raise DataError(f"{shard}: {state}, {SUMMARY} has {expected.bytes}; {REMEDY}")
    return Harvest(
        folder=folder, hook_names=tuple(manifest["hook_names"]), shards=shards, manifest=manifest, summary=summary
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest. Raises DataError naming the file and field if it is missing, damaged or of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing: {path.parent} holds no harvest") from e
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: damaged ({e}); remove the folder and run again") from e
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged (no JSON object); remove the folder and run again")
    if found.get("format") != FORMAT:
        raise DataError(
            f"{path}, field 'format': {found.get('format')!r} is not {FORMAT!r}; the cache was made by another version "
            f"of sailguard or is damaged; remove {path.parent} or use another work folder"
        )
    for name, kind in (("hook_names", list), ("block_rows", int), ("shards", int)):
        if not isinstance(found.get(name), kind):
            raise DataError(f"{path}, field {name!r}: damaged ({found.get(name)!r}); remove the folder and run again")
    return found

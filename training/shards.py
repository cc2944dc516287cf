"""One shard of a cache: a safetensors file with checksums, written whole or not at all, read through a memory map.

A shard holds, one row a token: the activation at every hook point (bfloat16), `document`, `token` (int32) and the
length of the activation at every hook point (float32). Its header names the cache it belongs to and has a CRC-32 of
every `block_rows` rows of every tensor, so what is read is checked when it is read, and no more than that.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError

DOCUMENT, TOKEN = "document", "token"
REMEDY = "remove it and harvest again: only what is missing is made anew"
_HEADER = "sailguard"
_ALIGNMENT = 64  # bytes; rows that are mapped begin where vector instructions like it
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}


def length_name(hook_name: str) -> str:
    """The name under which a shard holds the lengths of the activations of a hook point."""
    return f"length.{hook_name}"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An open shard; rows come straight from the memory map, after their checksum was compared."""

    path: Path
    block_rows: int
    checksums: Mapping[str, list[int]] = field(repr=False)
    tensors: Any = field(repr=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises DataError if the shard has none of that name."""
        return tuple(self._slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor, whole blocks but for the last of the shard.

        The result lies in the memory map: copy what is to outlive the shard. Raises DataError naming file and field.
        """
        found: Tensor = self._slice(name)[start:stop]
        for at, part in enumerate(torch.split(found, self.block_rows), start // self.block_rows):
            if zlib.crc32(raw_bytes(part)) != self.checksums[name][at]:
                first = at * self.block_rows
                raise DataError(
                    f"{self.path}, field {name!r}, rows {first} to {first + len(part) - 1}: the checksum is wrong, so "
                    f"the file was damaged on disk; {REMEDY}"
                )
        return found

    def _slice(self, name: str) -> Any:
        try:
            if name not in self.checksums:
                raise SafetensorError("the header has no checksums for it")
            return self.tensors.get_slice(name)
        except SafetensorError as e:
            raise DataError(f"{self.path}, field {name!r}: damaged ({e}); {REMEDY}") from e


@contextmanager
def open_shard(path: Path, run: str, number: int, block_rows: int) -> Iterator[Shard]:
    """Map a shard into memory. Raises DataError naming the file if it is damaged or belongs elsewhere."""
    try:
        tensors: Any = safe_open(path, framework="pt")
        header = json.loads((tensors.metadata() or {})[_HEADER])
        checksums, belongs = header["crc32"], (header["run"], header["shard"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: a damaged shard ({e}); {REMEDY}") from e
    if belongs != (run, number):
        raise DataError(f"{path}, field 'run': the shard is another one or of another harvest; {REMEDY}")
    with tensors:
        yield Shard(path=path, block_rows=block_rows, checksums=checksums, tensors=tensors)


def write_shard(path: Path, tensors: Mapping[str, Tensor], *, run: str, number: int, block_rows: int) -> None:
    """Write a shard atomically, as a safetensors file whose bytes depend on the arguments alone.

    tensors: contiguous, on the CPU. Raises DataError naming the file if the disk is full or cannot be written.
    """
    checksums = {
        name: [zlib.crc32(raw_bytes(part)) for part in torch.split(tensor, block_rows)]
        for name, tensor in tensors.items()
    }
    metadata = {_HEADER: json.dumps({"run": run, "shard": number, "crc32": checksums}, separators=(",", ":"))}
    with written(path) as file:
        write_safetensors(file, tensors, metadata)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all. Raises DataError naming it if the disk is full or cannot be written."""
    try:
        with atomic_file(path) as tmp, tmp.open("wb") as file:
            yield file
    except OSError as e:
        raise DataError(
            f"{path}: cannot be written ({e.strerror or e}); make room and run again, finished shards are kept"
        ) from e


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Stream tensors in the safetensors format. (Its library makes a temporary file of its own, private to the user,
    and a killed process leaves it there under a random name.)
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")

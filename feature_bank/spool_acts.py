"""The activations of one item of a spool as bytes: sparse, exact to float16, checked in every size when they are read.

    version (1 byte)  zlib( T, F, N as uint32 | segments int32 (T) | active features of each token uint16 (T)
                            | their columns uint16 (N) | their activations float16 (N) )

Everything is little-endian. zlib's own checksum covers all but the version.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError

__all__ = ["MAX_FEATURES", "MAX_TOKENS", "Acts", "pack", "unpack"]

MAX_TOKENS = 1024
"""Most tokens of an item."""
MAX_FEATURES = 65535

_VERSION = 1
_HEADER = struct.Struct("<III")
_LARGEST = float(np.finfo(np.float16).max)


class Acts(NamedTuple):
    """What the guard saw of T tokens."""

    segments: npt.NDArray[np.int64]
    """(T,): moving averages do not cross segments."""
    acts: npt.NDArray[np.float32]
    """(T, F): normalised activations, in the order of the bank's features."""


def pack(segments: npt.ArrayLike, acts: npt.ArrayLike) -> bytes:
    """Encode the segments (T,) and activations (T, F) of T tokens.

    What exceeds the largest float16 becomes that. Raises DataError for shapes that do not fit each other, more than
    `MAX_TOKENS` tokens, and activations that are not numbers.
    """
    rows = np.asarray(acts, dtype=np.float32)
    numbers = np.asarray(segments)
    if rows.ndim != 2 or numbers.shape != (rows.shape[0],):
        raise DataError(f"activations of shape {rows.shape} do not fit segments of shape {numbers.shape}: (T, F), (T,)")
    if rows.shape[0] > MAX_TOKENS or rows.shape[1] > MAX_FEATURES:
        raise DataError(f"{rows.shape} is more than an item holds: {MAX_TOKENS} tokens of {MAX_FEATURES} features")
    if not np.isfinite(rows).all():
        raise DataError("activations are not finite; they cannot be kept")
    halves = np.clip(rows, -_LARGEST, _LARGEST).astype("<f2")
    token, column = np.nonzero(halves)
    payload = b"".join(
        (
            _HEADER.pack(*rows.shape, len(token)),
            numbers.astype("<i4").tobytes(),
            np.bincount(token, minlength=rows.shape[0]).astype("<u2").tobytes(),
            column.astype("<u2").tobytes(),
            halves[token, column].tobytes(),
        )
    )
    return bytes([_VERSION]) + zlib.compress(payload, 6)


def unpack(blob: bytes) -> Acts:
    """Decode what `pack` encoded. Raises DataError for anything else."""
    if not blob:
        raise DataError("its activations are empty")
    if blob[0] != _VERSION:
        raise DataError(f"its activations are of version {blob[0]}, and this sailguard reads {_VERSION}: update it")
    tokens, features, active, body = _inflate(blob[1:])
    if len(body) != 6 * tokens + 4 * active:
        raise DataError("its activations are damaged: their sizes do not fit each other")
    segments = np.frombuffer(body, "<i4", tokens)
    counts = np.frombuffer(body, "<u2", tokens, 4 * tokens)
    column = np.frombuffer(body, "<u2", active, 6 * tokens)
    values = np.frombuffer(body, "<f2", active, 6 * tokens + 2 * active)
    if int(counts.sum(dtype=np.int64)) != active or (active and int(column.max()) >= features):
        raise DataError("its activations are damaged: they name tokens or features that are not there")
    if not np.isfinite(values).all():
        raise DataError("its activations are damaged: they are not finite")
    acts = np.zeros((tokens, features), dtype=np.float32)
    acts[np.repeat(np.arange(tokens), counts), column] = values
    return Acts(segments.astype(np.int64), acts)


def _inflate(data: bytes) -> tuple[int, int, int, bytes]:
    """The header and what follows it; no more is inflated than the header announces."""
    stream = zlib.decompressobj()
    try:
        header = stream.decompress(data, _HEADER.size)
        if len(header) != _HEADER.size:
            raise DataError("its activations are damaged: they end too early")
        tokens, features, active = _HEADER.unpack(header)
        if tokens > MAX_TOKENS or features > MAX_FEATURES or active > tokens * features:
            raise DataError(f"its activations are damaged: {active} of {tokens} tokens and {features} features")
        body = stream.decompress(stream.unconsumed_tail, 6 * tokens + 4 * active + 1)
    except zlib.error as error:
        raise DataError(f"its activations are damaged: {error}") from None
    if not stream.eof or stream.unused_data:
        raise DataError("its activations are damaged: they do not end where they should")
    return tokens, features, active, body

"""Activations as bytes: what comes out is what went in, to float16, and what is damaged is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_bank.errors import DataError
from feature_bank.spool_acts import MAX_TOKENS, pack, unpack


@st.composite
def observed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    tokens, features = draw(st.integers(0, 40)), draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    acts = rng.gamma(0.5, 2.0, (tokens, features)).astype(np.float32)
    acts[rng.random(acts.shape) < draw(st.floats(0, 1))] = 0
    return np.sort(rng.integers(0, 4, tokens)), acts


@given(observed())
def test_the_round_trip_is_exact_to_float16(given_: tuple[np.ndarray, np.ndarray]) -> None:
    segments, acts = given_
    found = unpack(pack(segments, acts))
    assert found.acts.dtype == np.float32
    np.testing.assert_array_equal(found.acts, acts.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(found.segments, segments)


def test_packing_twice_is_the_same_bytes() -> None:
    acts = np.random.default_rng(0).random((50, 30), dtype=np.float32)
    blob = pack(np.zeros(50), acts)
    again = unpack(blob)
    assert pack(again.segments, again.acts) == blob


def test_what_float16_does_not_reach_becomes_its_largest() -> None:
    assert unpack(pack([0], [[1e9, 0.5]])).acts.tolist() == [[65504.0, 0.5]]


@pytest.mark.parametrize(
    ("segments", "acts", "reason"),
    [
        (np.zeros(2), np.zeros((3, 4)), "do not fit"),
        (np.zeros(3), np.zeros(3), "do not fit"),
        (np.zeros(MAX_TOKENS + 1), np.zeros((MAX_TOKENS + 1, 2)), "more than an item holds"),
        (np.zeros(1), np.full((1, 2), np.nan), "not finite"),
        (np.zeros(1), np.full((1, 2), np.inf), "not finite"),
    ],
)
def test_what_cannot_be_kept_is_refused(segments: np.ndarray, acts: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        pack(segments, acts)


def test_every_byte_that_is_missing_or_altered_is_noticed() -> None:
    blob = pack([0, 0, 1], [[1, 0], [0, 2], [3, 4]])
    for length in range(len(blob)):
        with pytest.raises(DataError):
            unpack(blob[:length])
    for place in range(len(blob)):
        changed = bytearray(blob)
        changed[place] ^= 0x55
        with pytest.raises(DataError):
            unpack(bytes(changed))
    with pytest.raises(DataError):
        unpack(blob + b"\0")


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack("<III", 2**31, 10, 0),
        struct.pack("<III", 10, 10, 101),
        struct.pack("<III", 1, 1, 1) + struct.pack("<iHHe", 0, 1, 1, 1.0),  # a column that is not there
        struct.pack("<III", 1, 1, 1) + struct.pack("<iHHe", 0, 0, 0, 1.0),  # a feature of no token
        struct.pack("<III", 1, 1, 1) + struct.pack("<iHHe", 0, 1, 0, float("inf")),
        struct.pack("<III", 1, 1, 0) + bytes(10**6),  # more than its header announces
    ],
)
def test_sizes_and_numbers_are_checked(payload: bytes) -> None:
    with pytest.raises(DataError, match="damaged"):
        unpack(b"\1" + zlib.compress(payload))


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(DataError, match="version 2"):
        unpack(b"\2" + pack([0], [[1.0]])[1:])

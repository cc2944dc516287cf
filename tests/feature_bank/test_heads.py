"""Pooling and agreement equal their definitions, written out as loops; windows never cross segments."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_bank.heads import agreement, moving_average, segment_starts
from feature_bank.schema import Pooling

Floats = npt.NDArray[np.float32]
Segments = npt.NDArray[np.int64]
Data = tuple[Floats, Segments]


@st.composite
def segmented(draw: st.DrawFn) -> Data:
    """(n, d) values, and the segment number of each of n rows."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=0, max_size=5))
    numbers = draw(st.permutations(range(len(lengths))))
    segment = [number for number, length in zip(numbers, lengths, strict=True) for _ in range(length)]
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    return generator.normal(size=(len(segment), 3)).astype(np.float32), np.array(segment, dtype=np.int64)


def naive_average(values: Floats, segment: Segments, pooling: Pooling) -> list[list[float]]:
    result = []
    for t in range(len(values)):
        window = [s for s in range(max(0, t - pooling.window + 1), t + 1) if segment[s] == segment[t]]
        count = max(len(window), pooling.min_tokens)
        result.append([sum(float(values[s, c]) for s in window) / count for c in range(values.shape[1])])
    return result


def naive_agreement(logits: Floats, segment: Segments, tokens: int, settled: int) -> list[list[float]]:
    result = []
    for t in range(len(logits)):
        counted = [s for s in range(t + 1) if segment[s] == segment[t]][settled - 1 :]
        ends = t + 1 == len(logits) or segment[t + 1] != segment[t]
        if len(counted) < tokens and not ends:
            result.append([-math.inf] * logits.shape[1])
        else:
            last = counted[-tokens:] or [t]
            result.append([min(float(logits[s, c]) for s in last) for c in range(logits.shape[1])])
    return result


@given(data=segmented(), window=st.integers(1, 15), min_tokens=st.integers(1, 20))
def test_moving_average_is_its_definition(data: Data, window: int, min_tokens: int) -> None:
    values, segment = data
    pooling = Pooling(window=window, min_tokens=min_tokens, ceiling=1.0, evidence_tokens=1)
    expected = np.array(naive_average(values, segment, pooling)).reshape(values.shape)
    np.testing.assert_allclose(moving_average(values, segment, pooling), expected, atol=1e-6, rtol=1e-5)


@given(data=segmented(), tokens=st.integers(1, 15), settled=st.integers(1, 8))
def test_agreement_is_its_definition(data: Data, tokens: int, settled: int) -> None:
    values, segment = data
    expected = np.array(naive_agreement(values, segment, tokens, settled)).reshape(values.shape)
    np.testing.assert_array_equal(agreement(values, segment, tokens, settled=settled), expected)


@given(data=segmented(), other=st.integers(0, 999))
def test_what_stands_in_one_segment_changes_nothing_in_another(data: Data, other: int) -> None:
    values, segment = data
    pooling = Pooling(window=5, min_tokens=2, ceiling=1.0, evidence_tokens=1)
    changed = np.where((segment == 0)[:, None], np.full_like(values, other), values)
    rest = segment != 0
    for result in (lambda v: moving_average(v, segment, pooling), lambda v: agreement(v, segment, 3)):
        np.testing.assert_allclose(result(changed)[rest], result(values)[rest], atol=1e-6, rtol=1e-5)


def test_sums_stay_exact_over_long_texts() -> None:
    values = np.concatenate([np.full((50_000, 1), 1e4), np.zeros((10, 1))]).astype(np.float32)
    pooling = Pooling(window=4, min_tokens=1, ceiling=1.0, evidence_tokens=1)
    assert moving_average(values, np.zeros(50_010, dtype=np.int64), pooling)[-1] == 0


@pytest.mark.parametrize("segment", [[], [5], [1, 1, 0, 0, 0, 7]])
def test_segment_starts(segment: list[int]) -> None:
    expected = [segment.index(number) for number in segment]
    assert segment_starts(np.array(segment, dtype=np.int64)).tolist() == expected

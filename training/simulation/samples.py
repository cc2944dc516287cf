"""Which segments of the test split a feature's explanation is scored on: the same for every simulator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.explain.segmented import FIRES, SegmentedText, grade
from training.explain.segments import Segments
from training.selected import FeatureKey

SEGMENTS = 400  # a correlation of 0.2 happens by chance 14 % of the time among 40 segments, 0.2 % among 200
FIRING = 200  # of them, at most
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a feature does in units of one level, segments or tokens."""

    grades: IntArray
    """(n,) 0 to 10, see `grade`."""
    fires: npt.NDArray[np.bool_]
    """(n,)"""
    weights: FloatArray
    """(n,) how many units of the test split each one stands for."""
    documents: IntArray
    """(n,) the document of each."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The segments that one feature's explanation is scored on."""

    numbers: IntArray
    """(n,) segments of the text, rising."""
    segments: Truth
    tokens: Truth
    """The tokens of those segments, segment after segment."""
    owner: IntArray
    """(tokens,) the place in `numbers` of the segment that each token belongs to."""


def choose_samples(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    text: SegmentedText,
    *,
    seed: int,
    segments: int = SEGMENTS,
    firing: int = FIRING,
) -> Iterator[Sample]:
    """One sample a feature, in order, of the test split: see `samples_among`."""
    test = text.numbers("test")
    return samples_among(acts, keys, test, text.segments.take(test), seed=seed, segments=segments, firing=firing)


def samples_among(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    test: IntArray,
    chosen: Segments,
    *,
    seed: int,
    segments: int = SEGMENTS,
    firing: int = FIRING,
) -> Iterator[Sample]:
    """One sample a feature, in order.

    Of the segments on which it fires at most `firing` are taken, evenly over their strengths; of the others, at random,
    as many as make `segments` in all. Fewer than that there are only if the test split has no more.

    acts: (tokens, F) normalised activations of the whole harvest. test, chosen: the segments of the test split, their
    numbers in the text rising.
    """
    maxima = chosen.maxima(acts)
    for i, key in enumerate(keys):
        generator = np.random.default_rng(_seed(seed, key))
        strength = maxima[:, i].astype(np.float32)
        fires = np.flatnonzero(strength >= FIRES)
        others = np.flatnonzero(strength < FIRES)
        taken = fires[np.argsort(-strength[fires], kind="stable")]
        if len(taken) > firing:
            taken = taken[np.linspace(0, len(taken) - 1, firing).round().astype(np.int64)]
        room = min(segments - len(taken), len(others))
        picked = np.concatenate([taken, generator.choice(others, room, replace=False)]).astype(np.int64)
        picked.sort()
        y = strength[picked] >= FIRES
        weights = np.where(y, len(fires) / max(len(taken), 1), len(others) / max(room, 1))
        part = chosen.take(picked)
        rows, owner = part.rows()
        values = acts[rows, i].astype(np.float32)
        yield Sample(
            numbers=test[picked],
            segments=Truth(grades=grade(strength[picked]), fires=y, weights=weights, documents=part.documents),
            tokens=Truth(
                grades=grade(values),
                fires=values >= FIRES,
                weights=weights[owner],
                documents=part.documents[owner],
            ),
            owner=owner,
        )


def _seed(seed: int, key: FeatureKey) -> int:
    return int.from_bytes(hashlib.sha256(f"sample {seed} {key[0]} {key[1]}".encode()).digest()[:8])

"""How well an SAE tells concepts apart, before any of its features is explained: the metric of contrast pairs.

For a set of N pairs (q+ with the concept, q- without) and an SAE of D features (Safe-SAIL, arXiv 2509.18127; its text
was not at hand, so these forms are reconstructions):

    f_j    = (1/N) sum_i 1[j fires on q+_i and not on q-_i]     distinguishing frequency of feature j
    L0_t   = #{j : f_j >= t}                                    features that distinguish at threshold t
    I_CDF  = mean_j f_j = (1/D) integral_0^1 L0_t dt            expected distinguishing frequency

A feature fires on a text if it fires on any of its tokens. Beside f_j stands its reverse r_j, with q+ and q- exchanged.

**Null.** If the concept made no difference, the two sides of a pair would be exchangeable: which one is called q+ would
be a coin's toss. So in each repeat every pair is turned round with probability 1/2, and all figures are computed again;
this is the exact randomisation test for paired data. Partners are not permuted: texts of different pairs differ in
subject, genre and length too, so that null would be about those.

**What ranks.** The sum of f_j over all features is half the number of differences between the sides, plus half of how
many more features fire on q+ than on q-. Turning pairs round changes only the second part: I_CDF measures how dense an
SAE is, and lies near its null even where single features tell the concept apart. So SAEs are ranked by the

    separation = mean of the M largest max(0, f_j - r_j), less the mean of the same under the null

with M = 64: by how many more of the pairs the features that a domain's head would take fire on the text with the
concept than on its twin, beyond what choosing the best of D by chance gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError
from feature_bank.taxonomy import DOMAINS, Domain
from training.contrast import BoolArray, ContrastTexts, PairRows

BEST = 64
PERMUTATIONS = 200
GROUPS = 10
"""Of concepts, each left out once for the jackknife."""
_BLOCK = 8192  # features at a time: 200 permutations of them are 7 MB

FloatArray = npt.NDArray[np.float64]
Signs = npt.NDArray[np.float32]
Differences = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A figure and what pairs turned round at random give: mean, and 2.5th and 97.5th percentile."""

    value: float
    null: float
    null_low: float
    null_high: float

    @property
    def margin(self) -> float:
        """How far the figure lies above the null's mean."""
        return self.value - self.null

    @classmethod
    def of(cls, values: FloatArray) -> Measured:
        """From (1 + repeats,) values, of which the first is the observed one."""
        low, high = np.quantile(values[1:], (0.025, 0.975))
        return cls(value=float(values[0]), null=float(values[1:].mean()), null_low=float(low), null_high=float(high))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """L0_t at t = 1/N, 2/N, ..., 1, between which it is constant, and its null; (N,) each."""

    l0: FloatArray
    null: FloatArray
    null_low: FloatArray
    null_high: FloatArray


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What one SAE makes of a set of pairs."""

    pairs: int
    i_cdf: Measured
    """mean_j f_j."""
    net: Measured
    """mean_j max(0, f_j - r_j)."""
    separation: Measured
    """Mean of the largest max(0, f_j - r_j); its margin is what SAEs are ranked by."""
    best_frequency: float
    """The largest f_j."""
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class DomainContrast(Contrast):
    """A domain: all its pairs, each weighing alike, whatever their concept and language."""

    concepts: dict[str, Contrast]
    left_out: tuple[float, ...]
    """The margin of `separation` without each group of concepts in turn; empty for a domain of one concept."""


def contrast_figures(
    fired: BoolArray,
    texts: ContrastTexts,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    best: int = BEST,
) -> dict[Domain, DomainContrast]:
    """The figures of one SAE for every domain and concept of `texts.pairs`.

    fired: (documents, d_sae), as `training.contrast.firing` gives it. A pair is turned round in the same repeats
    whatever other pairs, SAEs or order there are, so figures of several SAEs can be compared pair by pair.

    Raises DataError if there is no pair.
    """
    if not texts.pairs:
        raise DataError("there are no contrast pairs to measure on")
    found: dict[Domain, DomainContrast] = {}
    for domain in DOMAINS:
        pairs = sorted((p for p in texts.pairs if p.domain == domain), key=lambda p: texts.documents[p.positive].id)
        if not pairs:
            continue
        differences = _differences(fired, pairs)
        signs = _signs([texts.documents[p.positive].id for p in pairs], permutations, seed)
        names = np.array([p.concept for p in pairs])
        concepts: dict[str, Contrast] = {}
        for name in dict.fromkeys(names.tolist()):
            own = names == name
            concepts[name] = Contrast(**_figures(differences[own], signs[:, own], best))
        found[domain] = DomainContrast(
            **_figures(differences, signs, best),
            concepts=concepts,
            left_out=tuple(_left_out(differences, signs, names, best)),
        )
    return found


def _differences(fired: BoolArray, pairs: Sequence[PairRows]) -> Differences:
    """(N, d_sae): 1 where a feature fires on q+ alone, -1 where on q- alone."""
    positive, negative = ([getattr(p, side) for p in pairs] for side in ("positive", "negative"))
    found: Differences = fired[positive].astype(np.int8) - fired[negative].astype(np.int8)
    return found


def _signs(ids: Sequence[str], permutations: int, seed: int) -> Signs:
    """(1 + permutations, N): 1 for a pair as it is, -1 for one turned round; the first row is as observed."""
    signs = np.ones((1 + permutations, len(ids)), dtype=np.float32)
    for column, name in enumerate(ids):
        own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        signs[1:, column] -= 2 * np.random.default_rng([seed, own]).integers(0, 2, permutations)
    return signs


class _Tally(NamedTuple):
    """Sums over features, a row for the pairs as observed and one for each repeat."""

    levels: npt.NDArray[np.int64]
    """(rows, N + 1): how many features distinguish 0, 1, ..., N pairs."""
    frequency: FloatArray
    """(rows,) sum_j f_j."""
    net: FloatArray
    """(rows,) sum_j max(0, f_j - r_j)."""
    best: FloatArray
    """(rows,) mean of the largest max(0, f_j - r_j)."""


def _tally(differences: Differences, signs: Signs, best: int) -> _Tally:
    """All sums, a block of features at a time."""
    rows, n = signs.shape
    width = n + 1
    levels = np.zeros(rows * width, dtype=np.int64)
    frequency, net = np.zeros(rows), np.zeros(rows)  # of whole numbers: no order of adding changes a bit
    largest = np.zeros((rows, min(best, differences.shape[1])), dtype=np.float32)
    for start in range(0, differences.shape[1], _BLOCK):
        block = differences[:, start : start + _BLOCK]
        total = np.abs(block).sum(0, dtype=np.int64)
        part, total = block[:, total > 0].astype(np.float32), total[total > 0]
        signed = signs @ part  # N (f_j - r_j): whole numbers, and exact as such
        counts = ((signed + total) / 2).astype(np.int64)  # N f_j
        levels += np.bincount((counts + np.arange(rows)[:, None] * width).ravel(), minlength=rows * width)
        frequency += counts.sum(1)
        np.maximum(signed, 0, out=signed)
        net += signed.sum(1, dtype=np.float64)
        candidates = np.concatenate([largest, signed], axis=1)
        largest = np.partition(candidates, -largest.shape[1], axis=1)[:, -largest.shape[1] :]
    return _Tally(levels.reshape(rows, width), frequency / n, net / n, largest.mean(1, dtype=np.float64) / n)


def _figures(differences: Differences, signs: Signs, best: int) -> dict[str, Any]:
    """The fields of a `Contrast`."""
    tally = _tally(differences, signs, best)
    n, d_sae = differences.shape
    at_least = tally.levels[:, :0:-1].cumsum(1)[:, ::-1].astype(np.float64)  # (rows, N): features with N f_j >= 1..N
    low, high = np.quantile(at_least[1:], (0.025, 0.975), axis=0)
    return {
        "pairs": n,
        "i_cdf": Measured.of(tally.frequency / d_sae),
        "net": Measured.of(tally.net / d_sae),
        "separation": Measured.of(tally.best),
        "best_frequency": float(np.count_nonzero(at_least[0])) / n,
        "curve": Curve(l0=at_least[0], null=at_least[1:].mean(0), null_low=low, null_high=high),
    }


def _left_out(differences: Differences, signs: Signs, names: npt.NDArray[np.str_], best: int) -> list[float]:
    """The margin of separation without each group of concepts; groups depend on the concepts' names alone."""
    order = sorted(set(names.tolist()), key=lambda name: hashlib.sha256(name.encode()).digest())
    groups = min(GROUPS, len(order))
    margins = []
    for group in range(groups if groups > 1 else 0):
        kept = ~np.isin(names, order[group::groups])
        margins.append(Measured.of(_tally(differences[kept], signs[:, kept], best).best).margin)
    return margins

"""What an explainer may see of a feature: segments on which it fires, and instructive ones on which it does not.

Everything comes from the discovery and calibration splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.corpus import OWN_SOURCE
from training.explain.interface import Excerpt, FeatureEvidence, Reason
from training.explain.segmented import FIRES, SegmentedText
from training.explain.token_texts import Decode, token_texts
from training.selected import FeatureKey, feature_id

DECILES = 10
NEGATIVES = 4  # of each reason
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Contrast texts read by the model, and which are twins: the same text with a concept and without it."""

    acts: npt.NDArray[np.float16]
    """(tokens, F) normalised activations of the same features."""
    token_ids: IntArray
    documents: IntArray
    """(tokens,) the text of every token."""
    pairs: Sequence[tuple[int, int]]
    """(text with, text without) of the pairs that are for training."""


def collect_evidence(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    text: SegmentedText,
    decode: Decode,
    *,
    triggers: Sequence[Sequence[str]],
    promoted: Sequence[Sequence[str]],
    domains: Sequence[Sequence[str]],
    concepts: Sequence[Sequence[str]] | None = None,
    twins: Twins | None = None,
    quotable_only: bool = False,
    seed: int,
) -> list[FeatureEvidence]:
    """Evidence of each feature, in order.

    acts: (tokens, F) normalised activations of the whole harvest. Per feature: `triggers`, the tokens that it is known
    to fire on; `promoted`, those that it makes more likely; `domains`, those it belongs to; `concepts`, those it tells
    apart. quotable_only: only text written for the project, as a bank may show it.

    Positives are one segment of every tenth of its activations, each of another document where there is one. Negatives
    are segments on which it does not fire at all: of any text, of text of its domains, those that hold one of its
    triggers all the same, and texts without a concept on whose twin it fires.
    """
    numbers = text.numbers("discovery", "calibration", own=quotable_only)
    segments = text.segments.take(numbers)
    maxima = segments.maxima(acts)
    labelled = {
        domain: np.array([domain in d.domains for d in text.documents], dtype=bool)[segments.documents]
        for domain in {name for row in domains for name in row}
    }
    holding = _holding(numbers, text, {token for row in triggers for token in row})
    found = []
    for i, key in enumerate(keys):
        generator = np.random.default_rng(_seed(seed, key))
        strength = maxima[:, i].astype(np.float32)
        silent = strength == 0
        of_domain = np.any([labelled[domain] for domain in domains[i]], axis=0) & silent
        lookalike = np.zeros(len(numbers), dtype=bool)
        for token in triggers[i]:
            lookalike[holding[token]] = True
        pools: list[tuple[Reason, npt.NDArray[np.bool_]]] = [
            ("lookalike", silent & lookalike),
            ("same_domain", of_domain),
            ("random", silent),
        ]
        negatives: list[Excerpt] = []
        taken: set[int] = set()
        for reason, pool in pools:
            chosen = _draw(np.flatnonzero(pool), segments.documents, taken, generator)
            negatives += [_excerpt(text, numbers[n], acts[:, i], reason) for n in chosen]
        found.append(
            FeatureEvidence(
                id=feature_id(key),
                positives=tuple(
                    _excerpt(text, numbers[n], acts[:, i], None) for n in _across(strength, segments.documents)
                ),
                negatives=tuple(negatives + (_contrasts(twins, i, decode) if twins is not None else [])),
                promoted_tokens=tuple(promoted[i]),
                concepts=tuple(concepts[i]) if concepts is not None else (),
            )
        )
    return found


def quotable(text: SegmentedText, number: int) -> bool:
    """Whether a segment's text was written for the project, outside the test split."""
    document = text.documents[int(text.segments.documents[number])]
    return document.source == OWN_SOURCE and document.split != "test"


def _across(strength: npt.NDArray[np.float32], documents: IntArray) -> list[int]:
    """The strongest segment of every tenth of those that fire, strongest first, each of a new document if possible."""
    firing = np.flatnonzero(strength >= FIRES)
    order = firing[np.argsort(-strength[firing], kind="stable")]
    chosen: list[int] = []
    seen: set[int] = set()
    for part in np.array_split(order, DECILES):
        fresh = [int(n) for n in part if int(documents[n]) not in seen]
        if len(part):
            chosen.append(fresh[0] if fresh else int(part[0]))
            seen.add(int(documents[chosen[-1]]))
    return chosen


def _draw(pool: IntArray, documents: IntArray, taken: set[int], generator: np.random.Generator) -> list[int]:
    """Some of a pool at random, one a document."""
    chosen: list[int] = []
    for n in generator.permutation(pool)[: 20 * NEGATIVES].tolist():
        if int(documents[n]) not in taken:
            taken.add(int(documents[n]))
            chosen.append(n)
        if len(chosen) == NEGATIVES:
            break
    return chosen


def _holding(numbers: IntArray, text: SegmentedText, tokens: set[str]) -> dict[str, list[int]]:
    """Token -> the places in `numbers` of the segments that hold it."""
    found: dict[str, list[int]] = {token: [] for token in tokens}
    for place, number in enumerate(numbers.tolist()):
        for piece in {piece.strip() for piece in text.tokens(number)} & tokens:
            found[piece].append(place)
    return found


def _excerpt(text: SegmentedText, number: int, acts: npt.NDArray[np.float16], reason: Reason | None) -> Excerpt:
    segment = text.segments[int(number)]
    return Excerpt(
        tokens=tuple(text.texts[segment.start : segment.stop]),
        activations=tuple(round(float(a), 4) for a in acts[segment.start : segment.stop]),
        reason=reason,
    )


def _contrasts(twins: Twins, feature: int, decode: Decode) -> list[Excerpt]:
    """Texts without a concept on which it is silent though it fires on their twins, from where it fires most down."""
    column = twins.acts[:, feature].astype(np.float32)
    peak = np.zeros(int(twins.documents.max(initial=-1)) + 1, dtype=np.float32)
    np.maximum.at(peak, twins.documents, column)
    told = [(float(peak[a]), b) for a, b in twins.pairs if peak[a] >= FIRES and peak[b] == 0]
    found = []
    for _, silent in sorted(told, key=lambda pair: -pair[0])[:NEGATIVES]:
        rows = np.flatnonzero(twins.documents == silent)
        pieces = token_texts(twins.token_ids[rows], twins.documents[rows], decode)
        found.append(Excerpt(tokens=tuple(pieces), activations=(0.0,) * len(pieces), reason="contrast"))
    return found


def _seed(seed: int, key: FeatureKey) -> int:
    return int.from_bytes(hashlib.sha256(f"evidence {seed} {key[0]} {key[1]}".encode()).digest()[:8])

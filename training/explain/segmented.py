"""The harvest's text, cut into segments once for everything that explains and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.corpus import OWN_SOURCE, Document
from training.explain.segments import Segments, cut_segments
from training.explain.token_texts import Decode, token_texts

FIRES = 0.3
"""A segment fires if its largest activation reaches this share of the feature's 99.9th percentile: weaker ones are
noise to a reader."""
GRADES = 10
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SegmentedText:
    """Tokens, their texts, and the segments that they form."""

    token_ids: IntArray
    """(tokens,)"""
    texts: list[str]
    """(tokens,) see `token_texts`."""
    segments: Segments
    documents: Sequence[Document]

    def numbers(self, *splits: str, own: bool = False) -> IntArray:
        """The segments of documents of these splits; `own`: only of those that were written for the project."""
        wanted = [d.split in splits and (not own or d.source == OWN_SOURCE) for d in self.documents]
        return np.flatnonzero(np.array(wanted, dtype=bool)[self.segments.documents])

    def rows(self, *splits: str) -> IntArray:
        """The tokens of documents of these splits."""
        return self.segments.take(self.numbers(*splits)).rows()[0]

    def text(self, number: int) -> str:
        """What a segment reads."""
        return "".join(self.tokens(number))

    def tokens(self, number: int) -> list[str]:
        """The texts of a segment's tokens."""
        return self.texts[self.segments.starts[number] : self.segments.stops[number]]


def segment_text(
    token_ids: npt.NDArray[Any], token_documents: npt.NDArray[Any], documents: Sequence[Document], decode: Decode
) -> SegmentedText:
    """Cut a harvest. token_ids, token_documents: (tokens,), as `Harvest.token_ids` and `Harvest.documents` are."""
    texts = token_texts(token_ids, token_documents, decode)
    return SegmentedText(
        token_ids=np.asarray(token_ids, dtype=np.int64),
        texts=texts,
        segments=cut_segments(texts, token_documents),
        documents=documents,
    )


def grade(acts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """min(10, floor(10 * a)) of normalised activations: the scale on which simulators are asked and judged."""
    graded: npt.NDArray[np.int64] = np.minimum(GRADES, np.floor(GRADES * acts.astype(np.float32))).astype(np.int64)
    return graded

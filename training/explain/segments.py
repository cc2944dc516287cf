"""Documents cut into segments of 8 to 32 tokens, at the ends of clauses and sentences where there are any."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from training.explain.interface import Segment

SHORTEST, LONGEST, WINDOW = 8, 32, 16
_CHUNK = 2048
IntArray = npt.NDArray[np.int64]
_CJK_END = re.compile(r"[。，、；：！？…]['\"”’」』）)]*\s*$")
_END = re.compile(r"(?:[.,;:!?]['\"”’)\]]*|\n|\s[-–—])\s*$")


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Segments in the order of the rows they cover."""

    documents: IntArray
    """(segments,)"""
    starts: IntArray
    stops: IntArray
    """Rows [start, stop)."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Segment:
        return Segment(
            document=int(self.documents[number]), start=int(self.starts[number]), stop=int(self.stops[number])
        )

    def take(self, chosen: npt.NDArray[Any]) -> Segments:
        """Some of them, by number or by mask."""
        return Segments(documents=self.documents[chosen], starts=self.starts[chosen], stops=self.stops[chosen])

    def rows(self) -> tuple[IntArray, IntArray]:
        """(rows covered, the number of the segment that covers each), segment after segment."""
        lengths = self.stops - self.starts
        owner = np.repeat(np.arange(len(self), dtype=np.int64), lengths)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.starts, lengths) + offset, owner

    def maxima(self, acts: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
        """(segments, F): the largest of each segment's rows of `acts`, (tokens, F), none of which may be negative."""
        ordered = acts.view(np.int16)  # numbers that are not negative sort as their bits do, and integers are faster
        found = np.empty((len(self), acts.shape[1]), dtype=np.int16)
        for first in range(0, len(self), _CHUNK):
            part = self.take(np.arange(first, min(first + _CHUNK, len(self))))
            rows, owner = part.rows()
            begins = np.searchsorted(owner, np.arange(len(part)))
            found[first : first + len(part)] = np.maximum.reduceat(ordered[rows], begins, axis=0)
        return found.view(np.float16)


def cut_segments(texts: Sequence[str], documents: npt.NDArray[Any]) -> Segments:
    """Segments that tile every document's rows.

    texts: (tokens,) as `token_texts` gives them; documents: (tokens,), those of a document together.

    A segment ends with a clause or sentence (ASCII or CJK punctuation, line breaks); short clauses are joined and long
    ones cut into windows of 16. Every segment has 8 to 32 tokens, except the single one of a shorter document.
    """
    documents = np.asarray(documents, dtype=np.int64)
    if len(documents) == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return Segments(documents=nothing, starts=nothing, stops=nothing)
    edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    starts: list[int] = []
    for first, last in pairwise(edges):
        starts += _starts(texts, first, last)
    found = np.array(starts, dtype=np.int64)
    return Segments(documents=documents[found], starts=found, stops=np.append(found[1:], len(documents)))


def _starts(texts: Sequence[str], first: int, last: int) -> list[int]:
    """Where the segments of rows [first, last) begin."""
    lengths: list[int] = []
    for clause in _clauses(texts, first, last):
        pieces = _windows(clause)
        if lengths and lengths[-1] < SHORTEST:
            lengths[-1:] = _joined(lengths[-1], pieces.pop(0))
        lengths += pieces
    if len(lengths) > 1 and lengths[-1] < SHORTEST:
        rest = lengths.pop()
        lengths[-1:] = _joined(lengths[-1], rest)
    return [first, *(first + np.cumsum(lengths[:-1])).tolist()]


def _clauses(texts: Sequence[str], first: int, last: int) -> Iterator[int]:
    """The lengths of the clauses."""
    start = first
    for row in range(first, last):
        if row + 1 == last or _ends(texts[row], texts[row + 1]):
            yield row + 1 - start
            start = row + 1


def _ends(text: str, following: str) -> bool:
    if _CJK_END.search(text):
        return not _CJK_END.match(following)
    # "3.5", "e.g." and "it's" hold no end: what follows must be set off
    return bool(_END.search(text)) and (text[-1:].isspace() or following[:1].isspace() or not following.isascii())


def _windows(length: int) -> list[int]:
    """A clause as it is, or in windows if it is too long; a short last window goes to the one before it."""
    if length <= LONGEST:
        return [length]
    pieces = [WINDOW] * (length // WINDOW)
    rest = length % WINDOW
    if rest >= SHORTEST:
        pieces.append(rest)
    else:
        pieces[-1] += rest
    return pieces


def _joined(a: int, b: int) -> list[int]:
    """Two neighbours, one of them too short, as one segment or as two of equal length."""
    total = a + b
    return [total] if total <= LONGEST else [total // 2, total - total // 2]

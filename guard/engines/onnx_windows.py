"""Which tokens of a text are read together, so that texts of any length are read in bounded memory.

A window is the ids that stand before a text in its role, some tokens of left context, and the tokens that are taken
from it. Every token is taken from exactly one window, and which one it is depends on the token's place alone: a text
that grows is read as one that lies there whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from feature_bank.batches import length_batches
from guard.judge import Floats


class Window(NamedTuple):
    """A stretch of a text's ids, and from where on its tokens are taken."""

    start: int
    taken: int
    stop: int


class Windows(NamedTuple):
    """The first window takes `context + stride` tokens, each later one the next `stride`, after `context` others."""

    context: int
    stride: int

    @property
    def length(self) -> int:
        """Most tokens of a window."""
        return self.context + self.stride

    @classmethod
    def of_length(cls, length: int) -> Windows:
        """Windows of at most so many tokens, a quarter of them context."""
        context = length // 4
        return cls(context, length - context)

    def covering(self, first: int, stop: int) -> Iterator[Window]:
        """The windows from which the tokens from `first` on, up to `stop`, are taken."""
        while first < stop:
            number = max(0, (first - self.context) // self.stride)
            end = min(stop, self.context + (number + 1) * self.stride)
            yield Window(number * self.stride, first, end)
            first = end


class Reader(Protocol):
    """What turns padded ids into activations."""

    def __call__(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> Floats:
        """(batch, length) right-padded ids and their mask -> (batch, length, F) feature activations."""


class Passage(NamedTuple):
    """What is to be read of one text: of `ids`, which stand after `head`, the tokens from `first` on."""

    head: Sequence[int]
    ids: Sequence[int]
    first: int = 0


def read_passages(read: Reader, passages: Sequence[Passage], windows: Windows, max_tokens: int) -> list[Floats]:
    """The activations (n, F) of what is to be read of each passage: from the first token on also those of the head.

    Windows of all passages are read together in batches of similar length, of at most `max_tokens` padded tokens (one
    window at least).
    """
    cut = [(place, window) for place, p in enumerate(passages) for window in windows.covering(p.first, len(p.ids))]
    sequences = [[*passages[place].head, *passages[place].ids[w.start : w.stop]] for place, w in cut]
    found: dict[int, Floats] = {}
    for batch in length_batches([len(s) for s in sequences], max_tokens):
        width = len(sequences[batch[-1]])
        ids = np.zeros((len(batch), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, number in enumerate(batch):
            length = len(sequences[number])
            ids[row, :length], mask[row, :length] = sequences[number], 1
        acts = read(ids, mask)
        for row, number in enumerate(batch):
            place, window = cut[number]
            skipped = 0 if window.taken == 0 else len(passages[place].head) + window.taken - window.start
            found[number] = acts[row, skipped : len(sequences[number])]
    parts: list[list[Floats]] = [[] for _ in passages]
    for number, (place, _) in enumerate(cut):
        parts[place].append(found[number])
    return [np.concatenate(part) if part else np.zeros((0, 0), dtype=np.float32) for part in parts]

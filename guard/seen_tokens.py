"""What the guard saw of one request's tokens, kept as it is judged: sparse, so that a long answer stays small."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from feature_bank.spool_acts import Acts
from guard.judge import Floats

__all__ = ["SeenTokens"]

_Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class SeenTokens:
    """Takes the activations of a request's judged tokens on the model's thread; read when the request has ended."""

    def __init__(self) -> None:
        self._prompt: tuple[npt.NDArray[np.int64], int, list[_Row]] | None = None
        self._rows: list[_Row] = []
        self._features = 0
        self._closed = False

    def close(self) -> None:
        """Take no more: of a request that is broken off the model may still read a token."""
        self._closed = True

    def prompt(self, segments: npt.NDArray[np.int64], acts: Floats) -> None:
        """Take the judged tokens of a prompt: their segments (k,) and activations (k, F)."""
        self._prompt = (segments.astype(np.int64), acts.shape[1], [_row(row) for row in acts])

    def token(self, acts: Floats) -> None:
        """Take the next judged token of the answer: its activations (F,), which may change afterwards."""
        if self._closed:
            return
        self._features = len(acts)
        self._rows.append(_row(acts))

    def of_prompt(self) -> Acts | None:
        """What was seen of the prompt; None before it was judged."""
        if self._prompt is None:
            return None
        segments, features, rows = self._prompt
        return Acts(segments, _dense(rows, features))

    def response(self) -> Acts | None:
        """What was seen of the answer so far; None where nothing was."""
        rows = tuple(self._rows)
        if not rows:
            return None
        return Acts(np.zeros(len(rows), dtype=np.int64), _dense(rows, self._features))


def _row(acts: Floats) -> _Row:
    columns = np.flatnonzero(acts)
    return columns.astype(np.int32), acts[columns]  # a copy


def _dense(rows: Iterable[_Row], features: int) -> Floats:
    rows = list(rows)
    acts = np.zeros((len(rows), features), dtype=np.float32)
    for token, (columns, values) in enumerate(rows):
        acts[token, columns] = values
    return acts

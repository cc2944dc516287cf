"""A domain's weights for responses that stream: fitted on windows as short as their moving average.

A head that was fitted on whole texts has weights for averages over whole texts. Over a few tokens an average swings far
more, and its peaks on harmless text push a threshold so high that little is found; weights that were fitted on windows
of that length take them into account.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.schema import Pooling
from training.calibration import SparseHead, balanced_weights, fit_sparse_head
from training.corpus import Document
from training.discovery import labels

FloatArray = npt.NDArray[np.float32]
WINDOWS = 8  # of a text, at most, evenly over it
# Ten times that of heads on whole texts: there are about eight windows a text, and each tells less
RIDGE_C = 0.01


def fit_streaming_head(
    acts: npt.NDArray[np.float16],
    token_documents: npt.NDArray[np.int64],
    documents: Sequence[Document],
    domain: str,
    pooling: Pooling,
) -> SparseHead:
    """A head over all columns, from windows of the discovery split; those of one text weigh as much as the text.

    acts: (tokens, F) normalised activations of the head's features; token_documents: (tokens,), the rows of a document
    being consecutive.
    """
    rows, y = labels(documents, domain, ("discovery",))
    weight = balanced_weights(y, [documents[row].source for row in rows])
    starts = np.flatnonzero(np.diff(token_documents, prepend=-1))
    ends = [*starts[1:], len(token_documents)]
    spans = {int(token_documents[start]): slice(start, end) for start, end in zip(starts, ends, strict=True)}
    pooled, truth, share = [], [], []
    for row, label, part in zip(rows.tolist(), y, weight, strict=True):
        if row not in spans:
            continue
        own = list(_windows(acts[spans[row]], pooling.streamed))
        pooled += own
        truth += [label] * len(own)
        share += [part / len(own)] * len(own)
    weights = np.array(share, dtype=np.float32)
    return fit_sparse_head(
        np.stack(pooled), np.array(truth), weights / weights.mean(), max_features=acts.shape[1], ridge=RIDGE_C
    )


def _windows(acts: npt.NDArray[np.float16], pooling: Pooling) -> Iterator[FloatArray]:
    """The moving average where it is full, at most `WINDOWS` times over a text; once at the end of a shorter one."""
    clipped = np.minimum(acts.astype(np.float32), pooling.ceiling)
    n, window = len(clipped), pooling.window
    number = min(WINDOWS, 2 + 2 * (n - window) // window) if n > window else 1
    for end in np.linspace(min(window, n), n, number).astype(int).tolist():
        length = min(window, end)
        yield clipped[end - length : end].sum(0) / max(length, pooling.min_tokens)

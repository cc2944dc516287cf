"""How feature activations become a domain's score: clip, moving average, linear head, agreement of tokens.

Fitting and guarding call the same functions, on the host: what is averaged is a few numbers a token. For a token t of
a segment (see `feature_bank.layout`):

    m_t = sum of clip(a_s, 0, ceiling) over the last `window` tokens s <= t of the segment / max(count, min_tokens)
    z_t = slope * (w . m_t + bias) + intercept     the calibrated logit; probability = sigmoid(z_t)
    e_t = min(z_{t-k+1}, ..., z_t)                 k = evidence_tokens; all of a segment that is shorter, at its end

A text that lies there whole (a prompt, a passage) is judged where its average has settled: its score is the maximum
of e_t over full windows, or z at the end of a segment that does not fill one. A response that streams cannot wait for
that: its window is the shorter `streaming_window`, its score the maximum of e_t from its token `settle_tokens` on, and
it has thresholds and, where the bank holds them, weights of its own, fitted on windows that short. Since the average is
linear, only w . clip(a) has to be averaged, not a.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from feature_bank.schema import Pooling

Real = TypeVar("Real", np.float32, np.float64)


def segment_starts(segment: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each of the n rows of `segment` (n,), the index of the first row of its segment. Segment numbers are
    constant on runs of rows."""
    changed = np.ones(len(segment), dtype=np.bool_)
    changed[1:] = segment[1:] != segment[:-1]
    return np.maximum.accumulate(np.where(changed, np.arange(len(segment)), 0))


def moving_average(values: npt.NDArray[Real], segment: npt.NDArray[np.int64], pooling: Pooling) -> npt.NDArray[Real]:
    """Causal moving average of `values` (n, d) within segments, as defined above. Summed in double precision."""
    if not len(values):
        return values
    index = np.arange(len(values))
    first = np.maximum(segment_starts(segment), index - pooling.window + 1)
    total = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, dtype=np.float64, out=total[1:])
    count = np.maximum(index - first + 1, pooling.min_tokens)
    average: npt.NDArray[Real] = ((total[index + 1] - total[first]) / count[:, None]).astype(values.dtype)
    return average


def agreement(
    logits: npt.NDArray[Real], segment: npt.NDArray[np.int64], tokens: int, *, settled: int = 1
) -> npt.NDArray[Real]:
    """e_t: the least of the last `tokens` of the `logits` (n, d) of the segment; -inf where there are fewer, unless it
    ends there.

    settled: the first token of a segment, counted from 1, whose logit counts; of a shorter segment only the last does.
    """
    if not len(logits):
        return logits
    index = np.arange(len(logits))
    start = segment_starts(segment)
    least = logits.copy()
    for back in range(1, tokens):
        earlier = index - back
        inside = (earlier - start + 1 >= settled)[:, None]
        np.minimum(least, logits[np.maximum(earlier, 0)], out=least, where=inside)
    ends = np.ones(len(segment), dtype=np.bool_)
    ends[:-1] = segment[1:] != segment[:-1]
    enough = (index - start + 1 >= settled + tokens - 1) | ends
    least[~enough] = -np.inf
    return least

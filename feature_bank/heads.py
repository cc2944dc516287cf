"""How feature activations become a domain's score: clip, moving average, linear head, agreement of tokens.

Fitting and guarding call the same functions. For a token t of a segment (see `feature_bank.layout`):

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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from feature_bank.schema import Pooling


def segment_starts(segment: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For each row, the index of the first row of its segment. Segment numbers are constant on runs of rows."""
    index = torch.arange(segment.shape[0], device=segment.device)
    changed = torch.ones_like(segment, dtype=torch.bool)
    changed[1:] = segment[1:] != segment[:-1]
    return torch.where(changed, index, 0).cummax(0).values


def moving_average(values: Float[Tensor, "n d"], segment: Int[Tensor, " n"], pooling: Pooling) -> Float[Tensor, "n d"]:
    """Causal moving average within segments, as defined above. Summed in double precision."""
    if values.shape[0] == 0:
        return values
    index = torch.arange(values.shape[0], device=values.device)
    first = torch.maximum(segment_starts(segment), index - pooling.window + 1)
    total = torch.zeros(values.shape[0] + 1, values.shape[1], dtype=torch.float64, device=values.device)
    torch.cumsum(values.double(), 0, out=total[1:])
    count = (index - first + 1).clamp_min(pooling.min_tokens)
    return ((total[index + 1] - total[first]) / count[:, None]).to(values.dtype)


def agreement(
    logits: Float[Tensor, "n d"], segment: Int[Tensor, " n"], tokens: int, *, settled: int = 1
) -> Float[Tensor, "n d"]:
    """e_t: the least of the last `tokens` logits of the segment; -inf where there are fewer, unless it ends there.

    settled: the first token of a segment, counted from 1, whose logit counts; of a shorter segment only the last does.
    """
    if logits.shape[0] == 0:
        return logits
    index = torch.arange(logits.shape[0], device=logits.device)
    start = segment_starts(segment)
    least = logits.clone()
    for back in range(1, tokens):
        earlier = index - back
        inside = (earlier - start + 1 >= settled)[:, None]
        least = torch.minimum(least, torch.where(inside, logits[earlier.clamp_min(0)], torch.inf))
    ends = torch.ones_like(segment, dtype=torch.bool)
    ends[:-1] = segment[1:] != segment[:-1]
    enough = (index - start + 1 >= settled + tokens - 1) | ends
    return torch.where(enough[:, None], least, -torch.inf)

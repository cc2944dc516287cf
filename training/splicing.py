"""Running a model with other values in place of its activations, and what that costs its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guard.capture import Capture, length_batches, pad_batch
from training.corpus import TokenSequence

_CHUNK_ROWS = 128  # rows of logits that are turned to float32 at a time


@contextmanager
def spliced(
    model: Any, hook_name: str, where: Bool[Tensor, "batch seq"], values: Float[Tensor, "rows d_in"]
) -> Iterator[None]:
    """While the context lasts, the activations at `where` are `values`, row by row, cast to the model's dtype.

    All others stay as they are, and the model is as it was when the context ends, whatever ends it. A batch that is run
    inside must be of the shape of `where`.
    """

    def observer(_: str, hidden: Tensor) -> Tensor:
        changed = hidden.clone()  # the activation may be somebody else's tensor too
        changed[where] = values.to(hidden.dtype)
        return changed

    with Capture(model, [hook_name], observer):
        yield


class TokenBatch(NamedTuple):
    """Sequences as a model reads them together, padded on the right."""

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    content: Bool[Tensor, "batch seq"]
    """Positions that count: the text's own tokens."""
    targets: Int[Tensor, " rows"]
    """For each position of `content` the token that follows, -1 where none does."""

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], device: torch.device) -> TokenBatch:
        """The batch of `sequences`."""
        ids, mask = pad_batch([s.ids for s in sequences], 0, device)
        content = torch.zeros_like(mask, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            content[row, torch.from_numpy(sequence.positions).to(device)] = True
        following = torch.full_like(ids, -1)
        following[:, :-1] = torch.where(mask[:, 1:].bool(), ids[:, 1:], -1)
        return cls(ids, mask, content, following[content])


def group_by_length(sequences: Sequence[TokenSequence], *, batch_tokens: int) -> list[list[TokenSequence]]:
    """Sequences of like length together, at most `batch_tokens` positions a group, padding counted."""
    ordered = sorted(sequences, key=lambda s: (len(s.ids), s.document))  # so the newest is a group's longest
    return [[ordered[i] for i in group] for group in length_batches([len(s.ids) for s in ordered], batch_tokens)]


def content_logits(model: Any, batch: TokenBatch) -> Float[Tensor, "rows vocabulary"]:
    """The model's logits at the positions of `content`, in its own dtype."""
    output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    rows: Tensor = output.logits[batch.content]
    return rows


def prediction_losses(
    logits: Float[Tensor, "rows vocabulary"],
    reference: Float[Tensor, "rows vocabulary"] | None,
    targets: Int[Tensor, " rows"],
) -> Float[Tensor, " 2"]:
    """Sums over rows, in nats: cross-entropy of the targets that are not -1, and KL(reference || logits); float64.

    Without a reference the second is 0.
    """
    total = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for start in range(0, len(logits), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        log_q = logits[part].float().log_softmax(dim=-1)
        known = targets[part] >= 0
        total[0] -= log_q[known].gather(1, targets[part][known][:, None]).double().sum()
        if reference is not None:
            log_p = reference[part].float().log_softmax(dim=-1)
            total[1] += (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum()
    return total

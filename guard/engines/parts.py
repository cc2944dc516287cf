"""What one packed pass holds of each request, and how those rows of it are steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from guard.engines.batch_manager import Share
from guard.engines.requests import Request


class Part(NamedTuple):
    """One request's tokens in a pass."""

    request: Request
    share: Share
    again: int
    """Tokens of the share that an earlier pass has read."""


def steer_parts(
    name: str, hidden: Float[Tensor, "1 T d_in"], parts: Sequence[Part], steered: Tensor | None
) -> Tensor | None:
    """The activations at a hook point with the rows of these parts steered, made of `steered` if some others are
    already; None if there is nothing to steer."""
    for request, share, _ in parts:
        if name not in request.judging.hook_names:
            continue
        for part, steering in request.steered(share.position, len(share.ids)):
            rows = slice(share.start + part.start, share.start + part.stop)
            changed = steering.apply(name, hidden[:, rows])
            if changed is not None:
                steered = hidden.clone() if steered is None else steered
                steered[:, rows] = changed
    return steered

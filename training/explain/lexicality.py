"""How much of a feature the token alone explains."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

CUT = 0.5  # from here on a feature is lexical
CEILING = 1.0  # in units of the 99.9th percentile, where the heads clip too: no single spike decides
SHRINKAGE = 2.0  # tokens' worth of the overall mean that each token's own mean is drawn to
_BLOCK = 64  # features at a time


def lexicality(
    acts: npt.NDArray[np.floating[Any]],
    token_ids: npt.NDArray[np.int64],
    fitted: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """(F,) share of the variance over tokens, 0 to 1, that a table of one mean a token explains.

    The table is made from the rows `fitted` and measured on the rows `held`, of other documents: 1 - SSE / SST, and 0
    where it is worse than the mean, or where nothing varies.

    acts: (tokens, F) normalised activations, clipped at 1 here.
    """
    found = np.zeros(acts.shape[1])
    if len(fitted) == 0 or len(held) == 0:
        return found
    types, kinds = np.unique(token_ids[fitted], return_inverse=True)
    table = sparse.csr_matrix((np.ones(len(fitted), dtype=np.float32), (kinds, np.arange(len(fitted)))))
    counts = np.asarray(table.sum(1), dtype=np.float64)
    place = np.minimum(np.searchsorted(types, token_ids[held]), len(types) - 1)
    unseen = types[place] != token_ids[held]
    for first in range(0, acts.shape[1], _BLOCK):
        block = slice(first, first + _BLOCK)
        known = np.minimum(acts[fitted, block].astype(np.float32), CEILING)
        mean = known.mean(0, dtype=np.float64)
        means = (table @ known + SHRINKAGE * mean) / (counts + SHRINKAGE)
        truth = np.minimum(acts[held, block].astype(np.float32), CEILING).astype(np.float64)
        error = ((truth - np.where(unseen[:, None], mean, means[place])) ** 2).sum(0)
        total = ((truth - truth.mean(0)) ** 2).sum(0)
        found[block] = np.clip(1.0 - error / np.where(total > 0, total, np.inf), 0.0, 1.0) * (total > 0)
    return found


def kind_of(share: float) -> Literal["lexical", "conceptual"]:
    """Lexical if the token alone explains at least half of the variance."""
    return "lexical" if share >= CUT else "conceptual"

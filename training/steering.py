"""What a domain is steered with: features that move the model's output, and each one's share in the mean difference.

A feature that reads a concept need not write it. Of the features that may be used, those are taken whose ablation
lowers the domain in what the model's last block holds, and no other domain by more. What they are added with is what
makes up the difference in means between text with the domain and without, the plain vector that steers well, out of
their decoder rows: argmin_{a >= 0} |a @ U - difference|^2 + DAMPING |a|^2 over rows U of unit length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from feature_bank.schema import FeatureRecord
from feature_bank.taxonomy import Domain
from training.causality import selective
from training.selected import FeatureKey, TrainedHook

FloatArray = npt.NDArray[np.float32]
DAMPING = 0.1  # rows that nearly coincide share what either could carry


def steering_features(records: Mapping[FeatureKey, FeatureRecord], domain: Domain) -> list[FeatureKey]:
    """Those whose ablation is selective for the domain; all, if no feature's is or none was ablated."""
    causal = [key for key, r in records.items() if r.causality is not None and selective(r.causality, domain)]
    return causal or list(records)


def steering_shares(
    difference: FloatArray, hook: TrainedHook, features: Sequence[FeatureKey], *, most: int
) -> dict[FeatureKey, float]:
    """Each feature's share of a mean difference at one hook point, in units of its activation; at most `most` have one.

    difference: (d_in,). features: of any hook point; only those of this one count.
    """
    keys = sorted(key for key in features if key[0] == hook.sae.hook_name)
    rows = hook.sae.W_dec[[index for _, index in keys]].float().numpy()
    length = np.linalg.norm(rows, axis=1)
    chosen = np.flatnonzero(length > 0)
    shares = _nonnegative(difference, rows[chosen] / length[chosen, None])
    if (shares > 0).sum() > most:
        kept = np.sort(np.argsort(-shares, kind="stable")[:most])
        chosen = chosen[kept]
        shares = _nonnegative(difference, rows[chosen] / length[chosen, None])
    return {keys[i]: float(share / length[i]) for i, share in zip(chosen, shares, strict=True) if share > 0}


def _nonnegative(target: FloatArray, rows: FloatArray) -> npt.NDArray[np.float64]:
    """(n,) by how much of each of the n rows `target` is approached."""
    if not len(rows):
        return np.zeros(0)
    damping = np.sqrt(DAMPING) * np.eye(len(rows))
    shares: npt.NDArray[np.float64] = nnls(np.vstack([rows.T, damping]), np.append(target, np.zeros(len(rows))))[0]
    return shares

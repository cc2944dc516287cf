"""Which concepts a feature tells apart: sign tests on contrast pairs, held against the number of tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.schema import ConceptScore
from feature_bank.taxonomy import Domain
from training.contrast import PairRows
from training.discovery import adjusted

SIGNIFICANCE = 0.05
SHOWN = 5  # concepts a feature


def concept_scores(
    fired: npt.NDArray[np.bool_], pairs: Sequence[PairRows], *, split: str = "train"
) -> list[list[ConceptScore]]:
    """Per feature, the concepts whose pairs it tells apart more often one way than the other, the surest first.

    fired: (texts, F), as `training.contrast.firing` gives it. Of a concept's pairs, a feature that has nothing to do
    with it fires on one side alone as often this way as that; the sign test asks how likely the observed surplus is
    then, and Benjamini and Hochberg's procedure over all features and concepts keeps the expected share of false
    discoveries at 5 %. `frequency` is the distinguishing frequency f_j of the selection metric.
    """
    from scipy.stats import binom

    places: dict[tuple[Domain, str], list[PairRows]] = {}
    for pair in pairs:
        if pair.split == split:
            places.setdefault((pair.domain, pair.concept), []).append(pair)
    names = list(places)
    n_features = fired.shape[1]
    forward = np.zeros((len(names), n_features), dtype=np.int64)
    reverse = np.zeros_like(forward)
    for row, members in enumerate(places.values()):
        on = fired[[p.positive for p in members]]
        off = fired[[p.negative for p in members]]
        forward[row] = (on & ~off).sum(0)
        reverse[row] = (off & ~on).sum(0)
    p = binom.sf(forward - 1, forward + reverse, 0.5)
    q = adjusted(np.where(forward + reverse > 0, p, 1.0))
    found: list[list[ConceptScore]] = []
    for feature in range(n_features):
        kept = np.flatnonzero(q[:, feature] <= SIGNIFICANCE)
        order = kept[np.lexsort((-forward[kept, feature], p[kept, feature]))][:SHOWN]
        found.append(
            [
                ConceptScore(
                    domain=names[row][0],
                    concept=names[row][1],
                    pairs=(n := len(places[names[row]])),
                    frequency=round(float(forward[row, feature]) / n, 4),
                    reverse=round(float(reverse[row, feature]) / n, 4),
                    q=float(f"{q[row, feature]:.3g}"),
                )
                for row in order.tolist()
            ]
        )
    return found

"""Which concepts a feature tells apart: tests on contrast pairs, held against the number of tests."""

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

    fired: (texts, F), as `training.contrast.firing` gives it. Where the concept makes no difference, a feature fires on
    the text with it alone as often as on its twin alone. How often it does the latter is known from the pairs of all
    concepts; that rate, or the concept's own if it is higher, is the binomial test's, for a concept has too few pairs
    for a sign test of its own. Benjamini and Hochberg's procedure over all features and concepts keeps the expected
    share of false discoveries at 5 %. `frequency` is the distinguishing frequency f_j of the selection metric.
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
    n = np.array([len(members) for members in places.values()])[:, None]
    everywhere = (reverse.sum(0) + 1) / (n.sum() + 2)
    p = binom.sf(forward - 1, n, np.maximum(everywhere, reverse / n))
    q = adjusted(p)
    found: list[list[ConceptScore]] = []
    for feature in range(n_features):
        kept = np.flatnonzero(q[:, feature] <= SIGNIFICANCE)
        order = kept[np.lexsort((-forward[kept, feature], p[kept, feature]))][:SHOWN]
        found.append(
            [
                ConceptScore(
                    domain=names[row][0],
                    concept=names[row][1],
                    pairs=int(n[row, 0]),
                    frequency=round(float(forward[row, feature] / n[row, 0]), 4),
                    reverse=round(float(reverse[row, feature] / n[row, 0]), 4),
                    q=float(f"{q[row, feature]:.3g}"),
                )
                for row in order.tolist()
            ]
        )
    return found

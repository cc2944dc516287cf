"""The fidelity of executable explanations: their predicates run on the test split, at both levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from feature_bank.schema import Predicate, SimulationScore
from feature_bank.taxonomy import Taxonomy
from training.explain.lexicons import concept_lexicons
from training.explain.segmented import SegmentedText
from training.selected import FeatureKey, feature_id
from training.simulation.executable import ExecutableSimulator
from training.simulation.samples import FIRING, SEGMENTS, choose_samples
from training.simulation.scores import score

Report = Callable[[str, int, int, str], None]
SIMULATOR = "executable"
NULLS = 100  # explanations of other features that each one is compared with


def score_features(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    predicates: Sequence[Predicate],
    text: SegmentedText,
    taxonomy: Taxonomy,
    *,
    seed: int,
    segments: int = SEGMENTS,
    firing: int = FIRING,
    report: Report | None = None,
) -> list[list[SimulationScore]]:
    """Per feature its segment-level and its token-level score; none of a level at which there is nothing to measure.

    acts: (tokens, F) normalised activations of the whole harvest; segments, firing: see `choose_samples`. The null of
    each feature is what the explanations of others, drawn once for all, predict on the same text.
    """
    simulator = ExecutableSimulator.of(predicates, concept_lexicons(taxonomy), text)
    varied = np.flatnonzero([len(predicate.terms) > 0 for predicate in predicates])
    drawn = np.random.default_rng(seed).permutation(varied)[:NULLS]
    everything = np.arange(len(simulator.numbers))
    null_segments = simulator.segments(everything, drawn)
    null_tokens = simulator.tokens(everything, drawn)
    found = []
    for i, sample in enumerate(choose_samples(acts, keys, text, seed=seed, segments=segments, firing=firing)):
        places, mine = simulator.places(sample), np.array([i])
        others = drawn != i
        scores = (
            score(
                simulator.segments(places, mine)[:, 0],
                sample.segments,
                null_segments[places][:, others],
                level="segment",
                simulator=SIMULATOR,
                seed=seed,
            ),
            score(
                simulator.tokens(places, mine)[:, 0],
                sample.tokens,
                null_tokens[simulator.rows(places)][:, others],
                level="token",
                simulator=SIMULATOR,
                seed=seed,
            ),
        )
        found.append([s for s in scores if s is not None])
        if report is not None and ((i + 1) % 25 == 0 or i + 1 == len(keys)):
            report("simulate", i + 1, len(keys), feature_id(keys[i]))
    return found

"""The fidelity of executable explanations: their predicates run on the test split, at both levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from feature_bank.schema import Predicate, SimulationScore
from feature_bank.taxonomy import Taxonomy
from training.columns import Columns, Parted
from training.explain.lexicons import concept_lexicons
from training.explain.segmented import SegmentedText
from training.explain.segments import Segments
from training.selected import FeatureKey
from training.simulation.executable import ExecutableSimulator
from training.simulation.samples import FIRING, SEGMENTS, samples_among
from training.simulation.scores import score
from training.spreading import Spread, Work, here, work_off

Report = Callable[[str, int, int, str], None]
SIMULATOR = "executable"
NULLS = 100  # explanations of other features that each one is compared with


@dataclass(frozen=True, kw_only=True)
class Scoring(Work[Columns, list[list[SimulationScore]]]):
    """What all explanations are scored with: the simulator that runs them, and what a few say of everything."""

    results = TypeAdapter(list[list[SimulationScore]])
    simulator: ExecutableSimulator
    test: Segments
    """The segments of the test split."""
    drawn: npt.NDArray[np.int64]
    """(k,) the features whose explanations every other one is compared with."""
    null_segments: npt.NDArray[np.float32]
    """(test segments, k) what those explanations give."""
    null_tokens: npt.NDArray[np.float32]
    """(tokens of the test segments, k)"""
    seed: int
    segments: int
    firing: int

    def do(self, part: Columns) -> list[list[SimulationScore]]:
        """The scores of each feature."""
        simulator = self.simulator
        samples = samples_among(
            part.acts,
            part.keys,
            simulator.numbers,
            self.test,
            seed=self.seed,
            segments=self.segments,
            firing=self.firing,
        )
        found = []
        for i, sample in enumerate(samples, part.first):
            places, mine = simulator.places(sample), np.array([i])
            others = self.drawn != i
            scores = (
                score(
                    simulator.segments(places, mine)[:, 0],
                    sample.segments,
                    self.null_segments[places][:, others],
                    level="segment",
                    simulator=SIMULATOR,
                    seed=self.seed,
                ),
                score(
                    simulator.tokens(places, mine)[:, 0],
                    sample.tokens,
                    self.null_tokens[simulator.rows(places)][:, others],
                    level="token",
                    simulator=SIMULATOR,
                    seed=self.seed,
                ),
            )
            found.append([s for s in scores if s is not None])
        return found


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
    spread: Spread = here,
    kept: Path | None = None,
) -> list[list[SimulationScore]]:
    """Per feature its segment-level and its token-level score; none of a level at which there is nothing to measure.

    acts: (tokens, F) normalised activations of the whole harvest; segments, firing: see `choose_samples`. The null of
    each feature is what the explanations of others, drawn once for all, predict on the same text. spread: who scores
    the features, a few at a time. kept: see `work_off`.
    """
    simulator = ExecutableSimulator.of(predicates, concept_lexicons(taxonomy), text)
    varied = np.flatnonzero([len(predicate.terms) > 0 for predicate in predicates])
    drawn = np.random.default_rng(seed).permutation(varied)[:NULLS]
    everything = np.arange(len(simulator.numbers))
    work = Scoring(
        simulator=simulator,
        test=text.segments.take(simulator.numbers),
        drawn=drawn,
        null_segments=simulator.segments(everything, drawn),
        null_tokens=simulator.tokens(everything, drawn),
        seed=seed,
        segments=segments,
        firing=firing,
    )
    parts = Parted(acts, keys)
    found = work_off(
        work, len(parts), parts.__getitem__, spread=spread, kept=kept, on_part=parts.counted(report, "simulate")
    )
    return [scores for part in found for scores in part]

"""The explainer that needs no language model: every feature as a predicate over a few terms, said in words.

Explanations are made from the discovery split; the calibration split decides how many terms a predicate has and
measures how lexical the feature is. The test split is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from scipy import sparse

from feature_bank.errors import DataError
from feature_bank.schema import Explainer, Predicate, Term
from feature_bank.taxonomy import Taxonomy
from training.columns import Columns, Parted
from training.explain.interface import Explanation
from training.explain.lexicality import kind_of, lexicality
from training.explain.lexicons import Lexicon, concept_lexicons
from training.explain.predicates import fit_predicates, frequent_ngrams, frequent_terms
from training.explain.segmented import FIRES, SegmentedText
from training.explain.segments import Segments
from training.explain.terms import trigger_tokens
from training.explain.vocabulary import Vocabulary, showable_vocabulary
from training.explain.wording import wording
from training.selected import FeatureKey
from training.spreading import Spread, Work, here, work_off

Report = Callable[[str, int, int, str], None]
SHOWN = 8  # tokens and n-grams listed beside the explanation


@dataclass(frozen=True, kw_only=True)
class ExplainedFeature:
    """What the executable explainer says of a feature."""

    explanation: Explanation
    trigger_tokens: list[Term]
    """The tokens on which it fires more often than on others."""
    ngrams: list[Term]
    """The words and word pairs that are more frequent in segments on which it fires; `documents` counts those."""
    lexicality: float
    kind: Literal["lexical", "conceptual"]


@dataclass(frozen=True, kw_only=True)
class Explaining(Work[Columns, list[ExplainedFeature]]):
    """What the explanations of all features are made from, beside their own activations."""

    results = TypeAdapter(list[ExplainedFeature])
    segments: Segments
    """Of the discovery split."""
    segments_held: Segments
    """Of the calibration split."""
    present: sparse.csc_matrix
    """(segments, terms) which terms occur where, of those that are frequent enough to stand for a feature."""
    present_held: sparse.csc_matrix
    vocabulary: Vocabulary
    token_ids: npt.NDArray[np.int64]
    """(tokens,) of the whole harvest."""
    rows: npt.NDArray[np.int64]
    """The tokens of the discovery split."""
    rows_held: npt.NDArray[np.int64]
    """The tokens of the calibration split."""
    showable: dict[int, str]
    """Texts of the tokens that may be named."""
    seed: int

    def do(self, part: Columns) -> list[ExplainedFeature]:
        """One explanation a feature."""
        acts = part.acts
        fires = self.segments.maxima(acts) >= FIRES
        held = self.segments_held.maxima(acts) >= FIRES
        documents = self.segments.documents
        shares = lexicality(acts, self.token_ids, self.rows, self.rows_held)
        triggers = trigger_tokens(
            sparse.csr_matrix(acts[self.rows] >= FIRES), self.token_ids[self.rows], self.showable, top=SHOWN
        )
        ngrams = frequent_ngrams(fires, self.present, documents, self.vocabulary, top=SHOWN)
        seeds = [_seed(self.seed, key) for key in part.keys]
        predicates = fit_predicates(fires, held, self.present, self.present_held, self.vocabulary, seeds=seeds)
        return [
            ExplainedFeature(
                explanation=explanation_of(predicate, self.vocabulary.lexicons, seed=self.seed),
                trigger_tokens=triggers[i],
                ngrams=next(ngrams),
                lexicality=round(float(shares[i]), 4),
                kind=kind_of(float(shares[i])),
            )
            for i, predicate in enumerate(predicates)
        ]


def explain_features(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    text: SegmentedText,
    taxonomy: Taxonomy,
    tokenizer: Any,
    *,
    seed: int,
    report: Report | None = None,
    spread: Spread = here,
    kept: Path | None = None,
) -> list[ExplainedFeature]:
    """One explanation a feature, in order; each depends on its own activations and the seed, not on the other features.

    acts: (tokens, F) normalised activations of the whole harvest, zero where the feature does not fire. spread: who
    explains the features, a few at a time. kept: see `work_off`.

    Raises DataError if no document lies in the discovery split. Without calibration documents, discovery stands in.
    """
    lexicons = concept_lexicons(taxonomy)
    vocabulary = showable_vocabulary(text.documents, taxonomy, lexicons, tokenizer)
    fitted, held = text.numbers("discovery"), text.numbers("calibration")
    if not len(fitted):
        raise DataError("no document lies in the discovery split, so nothing can be explained; give more text")
    if not len(held):
        held = fitted
    segments, segments_held = text.segments.take(fitted), text.segments.take(held)
    rows = text.rows("discovery")
    present = vocabulary.occurrences(segments, text.texts).by_segment
    frequent = frequent_terms(present)
    work = Explaining(
        segments=segments,
        segments_held=segments_held,
        present=present[:, frequent].tocsc(),
        present_held=vocabulary.occurrences(segments_held, text.texts).by_segment[:, frequent].tocsc(),
        vocabulary=Vocabulary(terms=tuple(vocabulary.terms[i] for i in frequent), lexicons=lexicons),
        token_ids=text.token_ids,
        rows=rows,
        rows_held=text.rows("calibration"),
        showable=_showable(text.token_ids[rows], vocabulary, tokenizer),
        seed=seed,
    )
    parts = Parted(acts, keys)
    found = work_off(
        work, len(parts), parts.__getitem__, spread=spread, kept=kept, on_part=parts.counted(report, "explain")
    )
    return [explained for part in found for explained in part]


def explanation_of(predicate: Predicate, lexicons: Mapping[str, Lexicon], *, seed: int | None = None) -> Explanation:
    """The predicate with its sentence."""
    return Explanation(
        text=wording(predicate, lexicons), explainer=Explainer(method="executable", seed=seed), predicate=predicate
    )


def _seed(seed: int, key: FeatureKey) -> int:
    """A feature's own seed, so that it is explained alike whatever stands beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key[0]} {key[1]}".encode()).digest()[:8])


def _showable(token_ids: npt.NDArray[np.int64], vocabulary: Vocabulary, tokenizer: Any) -> dict[int, str]:
    known = {term.text for term in vocabulary.terms if term.kind == "token"}
    decoded = {token: tokenizer.decode([token]) for token in np.unique(token_ids).tolist()}
    return {token: piece for token, piece in decoded.items() if piece.strip() in known}

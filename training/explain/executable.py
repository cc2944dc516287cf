"""The explainer that needs no language model: every feature as a predicate over a few terms, said in words.

Explanations are made from the discovery split; the calibration split decides how many terms a predicate has and
measures how lexical the feature is. The test split is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.errors import DataError
from feature_bank.schema import Explainer, Predicate, Term
from feature_bank.taxonomy import Taxonomy
from training.explain.interface import Explanation
from training.explain.lexicality import kind_of, lexicality
from training.explain.lexicons import Lexicon, concept_lexicons
from training.explain.predicates import fit_predicates, frequent_ngrams
from training.explain.segmented import FIRES, SegmentedText
from training.explain.terms import trigger_tokens
from training.explain.vocabulary import Vocabulary, showable_vocabulary
from training.explain.wording import wording
from training.selected import FeatureKey, feature_id

Report = Callable[[str, int, int, str], None]
SHOWN = 8  # tokens and n-grams listed beside the explanation
_BLOCK = 128


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


def explain_features(
    acts: npt.NDArray[np.float16],
    keys: Sequence[FeatureKey],
    text: SegmentedText,
    taxonomy: Taxonomy,
    tokenizer: Any,
    *,
    seed: int,
    report: Report | None = None,
) -> list[ExplainedFeature]:
    """One explanation a feature, in order; each depends on its own activations and the seed, not on the other features.

    acts: (tokens, F) normalised activations of the whole harvest, zero where the feature does not fire.

    Raises DataError if no document lies in the discovery split. Without calibration documents, discovery stands in.
    """
    lexicons = concept_lexicons(taxonomy)
    vocabulary = showable_vocabulary(text.documents, taxonomy, lexicons, tokenizer)
    fitted, held = text.numbers("discovery"), text.numbers("calibration")
    if not len(fitted):
        raise DataError("no document lies in the discovery split, so nothing can be explained; give more text")
    if not len(held):
        held = fitted
    present = vocabulary.occurrences(text.segments.take(fitted), text.texts).by_segment
    present_held = vocabulary.occurrences(text.segments.take(held), text.texts).by_segment
    fires = text.segments.take(fitted).maxima(acts) >= FIRES
    rows, rows_held = text.rows("discovery"), text.rows("calibration")
    shares = lexicality(acts, text.token_ids, rows, rows_held)
    triggers = _triggers(acts, rows, text, vocabulary, tokenizer)
    ngrams = frequent_ngrams(fires, present, text.segments.documents[fitted], vocabulary, top=SHOWN)
    predicates = fit_predicates(
        fires,
        text.segments.take(held).maxima(acts) >= FIRES,
        present,
        present_held,
        vocabulary,
        seeds=[_seed(seed, key) for key in keys],
    )
    found = []
    for i, predicate in enumerate(predicates):
        found.append(
            ExplainedFeature(
                explanation=explanation_of(predicate, lexicons, seed=seed),
                trigger_tokens=triggers[i],
                ngrams=next(ngrams),
                lexicality=round(float(shares[i]), 4),
                kind=kind_of(float(shares[i])),
            )
        )
        if report is not None and ((i + 1) % 25 == 0 or i + 1 == len(keys)):
            report("explain", i + 1, len(keys), feature_id(keys[i]))
    return found


def explanation_of(predicate: Predicate, lexicons: Mapping[str, Lexicon], *, seed: int | None = None) -> Explanation:
    """The predicate with its sentence."""
    return Explanation(
        text=wording(predicate, lexicons), explainer=Explainer(method="executable", seed=seed), predicate=predicate
    )


def _seed(seed: int, key: FeatureKey) -> int:
    """A feature's own seed, so that it is explained alike whatever stands beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key[0]} {key[1]}".encode()).digest()[:8])


def _triggers(
    acts: npt.NDArray[np.float16],
    rows: npt.NDArray[np.int64],
    text: SegmentedText,
    vocabulary: Vocabulary,
    tokenizer: Any,
) -> list[list[Term]]:
    token_ids = text.token_ids[rows]
    known = {term.text for term in vocabulary.terms if term.kind == "token"}
    decoded = {token: tokenizer.decode([token]) for token in np.unique(token_ids).tolist()}
    showable = {token: piece for token, piece in decoded.items() if piece.strip() in known}
    found: list[list[Term]] = []
    for first in range(0, acts.shape[1], _BLOCK):
        fires = sparse.csr_matrix(acts[rows, first : first + _BLOCK] >= FIRES)
        found += trigger_tokens(fires, token_ids, showable, top=SHOWN)
    return found

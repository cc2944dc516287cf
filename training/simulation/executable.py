"""The simulator that runs an explanation's predicate instead of asking a language model what it predicts.

A segment's prediction is p = sigmoid(bias + the weights of the terms that occur in it).

A token's prediction is p * (q_0 + q_1 * 2/3 + q_2 * (2/3)^2 + ...) / 3, where q_0 = sigmoid(bias + the weights of the
terms that end at the token), q_1 the same of the token before it, and so on to the segment's beginning. In words: the
segment must be one on which the feature fires, and there it fires where a term ends and, less with every token, after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.schema import Predicate
from training.explain.lexicons import Lexicon
from training.explain.logistic import sigmoid
from training.explain.segmented import SegmentedText
from training.explain.segments import LONGEST
from training.explain.vocabulary import TermKey, vocabulary_of
from training.simulation.samples import Sample

KEPT = 2 / 3  # of what a term does, from a token to the next
_CHUNK = 512  # segments
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ExecutableSimulator:
    """Predicates, and where their terms occur in the segments of the test split."""

    numbers: IntArray
    """(test segments,) their numbers in the text, rising."""
    first: IntArray
    """(test segments + 1,) where each segment's tokens begin in `by_token`."""
    by_segment: sparse.csr_matrix
    """(test segments, terms)"""
    by_token: sparse.csr_matrix
    """(tokens of the test segments, terms)"""
    weights: sparse.csc_matrix
    """(terms, predicates)"""
    biases: FloatArray
    """(predicates,)"""

    @classmethod
    def of(
        cls, predicates: Sequence[Predicate], lexicons: Mapping[str, Lexicon], text: SegmentedText
    ) -> ExecutableSimulator:
        """Look for the predicates' terms in the test split."""
        vocabulary = vocabulary_of(predicates, lexicons)
        numbers = text.numbers("test")
        segments = text.segments.take(numbers)
        found = vocabulary.occurrences(segments, text.texts)
        weights = sparse.lil_matrix((len(vocabulary.terms), len(predicates)), dtype=np.float32)
        for i, predicate in enumerate(predicates):
            for term in predicate.terms:
                column = vocabulary.column.get(TermKey(term.kind, term.text))
                if column is not None:
                    weights[column, i] = term.weight
        return cls(
            numbers=numbers,
            first=np.concatenate([[0], np.cumsum(segments.stops - segments.starts)]).astype(np.int64),
            by_segment=found.by_segment,
            by_token=found.by_token,
            weights=weights.tocsc(),
            biases=np.array([predicate.bias for predicate in predicates], dtype=np.float32),
        )

    def places(self, sample: Sample) -> IntArray:
        """(n,) the sample's segments as rows of `by_segment`."""
        found: IntArray = np.searchsorted(self.numbers, sample.numbers).astype(np.int64)
        return found

    def rows(self, places: IntArray) -> IntArray:
        """(tokens,) the tokens of those segments as rows of `by_token`, segment after segment."""
        lengths = self.first[places + 1] - self.first[places]
        begins = np.cumsum(lengths) - lengths
        found: IntArray = np.arange(lengths.sum()) + np.repeat(self.first[places] - begins, lengths)
        return found

    def segments(self, places: IntArray, predicates: IntArray) -> FloatArray:
        """(n, k) what each of k predicates gives for each of n segments."""
        z = (self.by_segment[places] @ self.weights[:, predicates]).toarray() + self.biases[predicates]
        return sigmoid(z).astype(np.float32)

    def tokens(self, places: IntArray, predicates: IntArray) -> FloatArray:
        """(tokens, k) what each of k predicates gives for each token of those segments."""
        chosen = self.weights[:, predicates]
        used = np.unique(chosen.indices)
        weights = chosen[used].toarray()
        terms = self.by_token[:, used]
        parts: list[FloatArray] = [np.zeros((0, len(predicates)), dtype=np.float32)]
        for start in range(0, len(places), _CHUNK):
            part = places[start : start + _CHUNK]
            lengths = self.first[part + 1] - self.first[part]
            z = terms[self.rows(part)] @ weights + self.biases[predicates]
            felt: FloatArray = (sigmoid(z) * (1 - KEPT)).astype(np.float32)
            within = np.arange(len(felt)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            for position in range(1, LONGEST):
                here = np.flatnonzero(within == position)
                felt[here] += KEPT * felt[here - 1]
            felt *= np.repeat(self.segments(part, predicates), lengths, axis=0)
            parts.append(felt)
        return np.concatenate(parts)

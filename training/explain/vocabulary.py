"""The terms that an explanation may be made of, and where they occur in segments.

Only what stands in text written for the project is a term, so that an explanation quotes no other text.

- A `token` occurs where a token is spelt so, space around it aside.
- An `ngram` (a word or two in a row in lower case, or two Chinese characters in a row) occurs where it ends.
- A `concept` occurs where a word of its lexicon ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.layout import content_ids
from feature_bank.schema import Predicate
from feature_bank.taxonomy import Taxonomy
from training.corpus import OWN_SOURCE, Document
from training.explain.lexicons import Lexicon
from training.explain.segments import Segments
from training.explain.terms import spans_of, terms_of
from training.explain.token_texts import token_texts

Kind = Literal["token", "ngram", "concept"]
_QUOTES = frozenset("“”")  # an explanation quotes its terms with these


class TermKey(NamedTuple):
    """A term's identity. A concept's text is its id, `domain/concept`."""

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Terms in a fixed order, and the lexicons behind those that are concepts."""

    terms: tuple[TermKey, ...]
    lexicons: Mapping[str, Lexicon]

    @cached_property
    def column(self) -> dict[TermKey, int]:
        """Where each term stands in the order."""
        return {term: i for i, term in enumerate(self.terms)}

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {term.text: i for i, term in enumerate(self.terms) if term.kind == "token"}

    @cached_property
    def _words(self) -> dict[str, list[int]]:
        """N-gram -> the columns that it makes occur: its own and those of the concepts that it belongs to."""
        found = {term.text: [i] for i, term in enumerate(self.terms) if term.kind == "ngram"}
        for i, term in enumerate(self.terms):
            if term.kind == "concept":
                for word in self.lexicons[term.text].words:
                    found.setdefault(word, []).append(i)
        return found

    def occurrences(self, segments: Segments, texts: Sequence[str]) -> Occurrences:
        """Where the terms occur in segments. texts: (tokens,) of the whole, as `token_texts` gives them."""
        tokens, words = self._tokens, self._words
        token_of = {text: tokens.get(text.strip(), -1) for text in set(texts)}
        rows: list[int] = []
        columns: list[int] = []
        offset = 0
        for start, stop in zip(segments.starts.tolist(), segments.stops.tolist(), strict=True):
            pieces = texts[start:stop]
            for i, piece in enumerate(pieces):
                column = token_of[piece]
                if column >= 0:
                    rows.append(offset + i)
                    columns.append(column)
            ends = list(accumulate(map(len, pieces)))
            for word, end in spans_of("".join(pieces)):
                for column in words.get(word, ()):
                    rows.append(offset + bisect_left(ends, end))
                    columns.append(column)
            offset += stop - start
        shape = (offset, len(self.terms))
        by_token = _binary(np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), shape)
        owner = segments.rows()[1]
        pairs = by_token.tocoo()
        by_segment = _binary(owner[pairs.row], pairs.col, (len(segments), len(self.terms)))
        return Occurrences(by_token=by_token, by_segment=by_segment, owner=owner)


class Occurrences(NamedTuple):
    """Which terms occur where; ones and zeros, float32."""

    by_token: sparse.csr_matrix
    """(tokens of the segments, terms), segment after segment."""
    by_segment: sparse.csr_matrix
    """(segments, terms)"""
    owner: npt.NDArray[np.int64]
    """(tokens of the segments,) the number of each one's segment."""


def _binary(rows: npt.NDArray[Any], columns: npt.NDArray[Any], shape: tuple[int, int]) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def showable_vocabulary(
    documents: Sequence[Document], taxonomy: Taxonomy, lexicons: Mapping[str, Lexicon], tokenizer: Any
) -> Vocabulary:
    """Tokens and n-grams of the text written for the project, outside the test split, and the taxonomy's concepts."""
    own = [d.text for d in documents if d.source == OWN_SOURCE and d.split != "test"]
    for record in taxonomy.values():
        for concept in record.concepts:
            own += [text for pair in concept.pairs if pair.split == "train" for text in (pair.positive, pair.negative)]
            own += [hard.text for hard in concept.hard_negatives]
    ngrams = {term for text in own for term in terms_of(text)}
    ids = [content_ids(tokenizer, text) for text in own]
    owner = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    pieces = token_texts(np.array([t for row in ids for t in row], dtype=np.int64), owner, tokenizer.decode)
    tokens = {text for piece in pieces if (text := piece.strip()) and not _QUOTES & set(text)}
    return Vocabulary(
        terms=(
            *(TermKey("token", text) for text in sorted(tokens)),
            *(TermKey("ngram", text) for text in sorted(ngrams)),
            *(TermKey("concept", key) for key in sorted(lexicons)),
        ),
        lexicons=lexicons,
    )


def vocabulary_of(predicates: Iterable[Predicate], lexicons: Mapping[str, Lexicon]) -> Vocabulary:
    """The terms that occur in predicates.

    A concept without a lexicon (of another taxonomy than the predicate's) is left out: it occurs nowhere.
    """
    terms = {TermKey(term.kind, term.text) for predicate in predicates for term in predicate.terms}
    known = [term for term in terms if term.kind != "concept" or term.text in lexicons]
    return Vocabulary(terms=tuple(sorted(known)), lexicons=lexicons)

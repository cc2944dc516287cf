"""The sparse logistic predicate that stands for a feature: at most a dozen terms, fitted to where it fires."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.schema import Predicate, PredicateTerm, Term
from training.explain.logistic import Fit, select_forward
from training.explain.terms import MIN_DOCUMENTS, log_odds_z, significant
from training.explain.vocabulary import TermKey, Vocabulary

LARGEST = 12  # terms of a predicate
CANDIDATES = 60  # terms that a feature's choice is made from
LEAST_SEGMENTS = 4  # in which a term must occur
LEAST_GAIN = 0.002  # of the loss without terms, that each must save on held-out text
CASES, CONTROLS = 1000, 2000  # sampled of the segments on which a feature fires, and of the others
_PRIOR = 500.0  # segments' worth of the terms' common frequencies that the log-odds are smoothed with
_BLOCK = 128  # features screened at a time
BoolArray = npt.NDArray[np.bool_]


def fit_predicates(
    fires: BoolArray,
    held: BoolArray,
    present: sparse.csr_matrix,
    present_held: sparse.csr_matrix,
    vocabulary: Vocabulary,
    *,
    seeds: Sequence[int],
) -> Iterator[Predicate]:
    """One predicate a feature, in order.

    fires, held: (segments, F) on which segments each feature fires, of the documents that are fitted and of those by
    which the number of terms is chosen; present, present_held: (segments, terms) which terms occur there.

    Terms are screened over all segments by the z-score of their smoothed log-odds, more and less frequent ones alike,
    under control of the false discovery rate, and then chosen one by one.
    """
    frequent = frequent_terms(present)
    present, present_held = present[:, frequent].tocsc(), present_held[:, frequent].tocsc()
    totals = np.asarray(present.sum(0), dtype=np.float64).ravel()
    for number, inside in _counted(fires, present):
        fit, chosen = _fit(
            _screen(inside, totals),
            fires[:, number],
            held[:, number],
            present,
            present_held,
            np.random.default_rng(seeds[number]),
        )
        yield _predicate(fit, [vocabulary.terms[frequent[column]] for column in chosen])


def frequent_terms(present: sparse.csr_matrix) -> npt.NDArray[np.int64]:
    """The columns of the terms that occur in enough segments. present: (segments, terms)."""
    return np.flatnonzero(np.asarray(present.sum(0)).ravel() >= LEAST_SEGMENTS)


def frequent_ngrams(
    fires: BoolArray,
    present: sparse.csr_matrix,
    documents: npt.NDArray[np.int64],
    vocabulary: Vocabulary,
    *,
    top: int,
) -> Iterator[list[Term]]:
    """Per feature, in order, the n-grams most typical of the segments on which it fires, by the same z-score.

    documents: (segments,) the document of each; a term counts in those where it stands in a segment that fires.
    """
    columns = np.array([i for i, term in enumerate(vocabulary.terms) if term.kind == "ngram"], dtype=np.int64)
    here = present[:, columns].tocsc()
    totals = np.asarray(here.sum(0), dtype=np.float64).ravel()
    common = np.flatnonzero(totals >= LEAST_SEGMENTS)
    here, totals, columns = here[:, common], totals[common], columns[common]
    for number, inside in _counted(fires, here):
        if inside.sum() == 0 or inside.sum() == totals.sum() or len(totals) == 1:
            yield []
            continue
        z = log_odds_z(inside, totals - inside, totals * (_PRIOR / totals.sum()))
        passed = np.flatnonzero(significant(z))
        found = []
        for i in passed[np.argsort(-z[passed], kind="stable")]:
            segments = here.indices[here.indptr[i] : here.indptr[i + 1]]
            count = len(np.unique(documents[segments[fires[segments, number]]]))
            if count >= MIN_DOCUMENTS:
                found.append(Term(text=vocabulary.terms[columns[i]].text, z=round(float(z[i]), 2), documents=count))
            if len(found) == top:
                break
        yield found


def _counted(fires: BoolArray, present: sparse.csc_matrix) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """(feature, in how many of its segments each term occurs), a block of features at a time."""
    for first in range(0, fires.shape[1], _BLOCK):
        block = sparse.csc_matrix(fires[:, first : first + _BLOCK], dtype=np.float32)
        inside = np.asarray((present.T @ block).todense(), dtype=np.float64)
        for i in range(inside.shape[1]):
            yield first + i, inside[:, i]


def _screen(inside: npt.NDArray[np.float64], totals: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The terms that go with a feature's segments or with the others, strongest first; three quarters the former."""
    outside = totals - inside
    if inside.sum() == 0 or outside.sum() == 0 or len(totals) == 1:  # one term alone has no odds against others
        return np.zeros(0, dtype=np.int64)
    z = log_odds_z(inside, outside, totals * (_PRIOR / totals.sum()))
    found = []
    for sign, room in ((1, 3 * CANDIDATES // 4), (-1, CANDIDATES // 4)):
        passed = np.flatnonzero(significant(sign * z))
        found.append(passed[np.argsort(-sign * z[passed], kind="stable")[:room]])
    return np.concatenate(found)


def _fit(
    candidates: npt.NDArray[np.int64],
    fires: BoolArray,
    held: BoolArray,
    present: sparse.csc_matrix,
    present_held: sparse.csc_matrix,
    generator: np.random.Generator,
) -> tuple[Fit, npt.NDArray[np.int64]]:
    rate = float(fires.mean())
    rows = _sample(fires, CASES, CONTROLS, generator)
    rows_held = _sample(held, CASES, CONTROLS, generator)
    fit = select_forward(
        present[:, candidates][rows].toarray().astype(np.float64),
        fires[rows],
        present_held[:, candidates][rows_held].toarray().astype(np.float64),
        held[rows_held],
        rate=rate,
        largest=LARGEST,
        least_gain=LEAST_GAIN,
    )
    return fit, candidates[list(fit.columns)]


def _sample(fires: BoolArray, cases: int, controls: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    parts = []
    for rows, most in ((np.flatnonzero(fires), cases), (np.flatnonzero(~fires), controls)):
        parts.append(np.sort(generator.choice(rows, most, replace=False)) if len(rows) > most else rows)
    return np.concatenate(parts)


def _predicate(fit: Fit, terms: list[TermKey]) -> Predicate:
    order = np.argsort(-fit.weights, kind="stable")
    return Predicate(
        terms=[
            PredicateTerm(kind=terms[i].kind, text=terms[i].text, weight=round(float(fit.weights[i]), 4)) for i in order
        ],
        bias=round(fit.bias, 4),
    )

"""First explanations without a language model: the tokens and n-grams that go with a feature, tested against the rest.

Only terms that occur in text written for the project are shown, so that no other text of the corpus is quoted, and the
statistics behind them come from the whole corpus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from feature_bank.schema import Evidence, Term
from training.corpus import OWN_SOURCE, Document

_WORD = re.compile(r"[^\W\d_\u3400-\u9fff]+(?:'[a-z]+)?|[\u3400-\u9fff]")
MIN_DOCUMENTS = 5
FALSE_DISCOVERY_RATE = 0.01


def spans_of(text: str) -> list[tuple[str, int]]:
    """Words and word pairs, lower-cased, and of Chinese text pairs of characters; each with where it ends."""
    words = [(match[0].lower(), match.end()) for match in _WORD.finditer(text)]
    pairs = [
        (a + b if "\u3400" <= a[0] <= "\u9fff" and "\u3400" <= b[0] <= "\u9fff" else f"{a} {b}", end)
        for (a, _), (b, end) in pairwise(words)
    ]
    return [(word, end) for word, end in words if len(word) > 1] + pairs


def terms_of(text: str) -> list[str]:
    """Words and word pairs, lower-cased; of Chinese text, pairs of characters."""
    return [term for term, _ in spans_of(text)]


class TermTable:
    """Which showable terms stand in which documents."""

    def __init__(self, documents: Sequence[Document]) -> None:
        own = {term for d in documents if d.source == OWN_SOURCE and d.split != "test" for term in terms_of(d.text)}
        self.vocabulary = sorted(own)
        column = {term: i for i, term in enumerate(self.vocabulary)}
        rows, columns = [], []
        for row, document in enumerate(documents):
            if document.split == "test":
                continue
            for i in {column[t] for t in terms_of(document.text) if t in column}:
                rows.append(row)
                columns.append(i)
        shape = (len(documents), len(self.vocabulary))
        self.present = sparse.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)
        self.documents = np.asarray(self.present.sum(0)).ravel()

    def contrast(self, firing: npt.NDArray[np.bool_], *, top: int) -> list[list[Term]]:
        """Per feature, the terms more frequent in the documents where it fires strongly, by smoothed log-odds z-score.

        firing: (n_documents, F). Log-odds with an informative Dirichlet prior (Monroe et al., 2008), kept at a false
        discovery rate of 1 % (Benjamini-Hochberg) and in at least 5 documents.
        """
        inside = np.asarray((self.present.T @ sparse.csr_matrix(firing.astype(np.float32))).todense())  # (terms, F)
        found: list[list[Term]] = []
        totals = self.documents
        prior = totals * (500.0 / max(totals.sum(), 1.0)) + 0.01
        for feature in range(firing.shape[1]):
            a = inside[:, feature]
            b = totals - a
            z = log_odds_z(a, b, prior)
            keep = significant(z) & (a >= MIN_DOCUMENTS)
            order = [i for i in np.argsort(-z, kind="stable") if keep[i]]
            found.append(
                [Term(text=self.vocabulary[i], z=round(float(z[i]), 2), documents=int(a[i])) for i in order[:top]]
            )
        return found


def log_odds_z(inside: npt.NDArray[Any], outside: npt.NDArray[Any], prior: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """z-scores of the difference of smoothed log-odds of every term, inside against outside."""
    n_in, n_out, n_prior = inside.sum(), outside.sum(), prior.sum()
    a, b = inside + prior, outside + prior
    delta = np.log(a / (n_in + n_prior - a)) - np.log(b / (n_out + n_prior - b))
    z: npt.NDArray[np.float64] = delta / np.sqrt(1 / a + 1 / b)
    return z


def significant(z: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which positive z-scores survive Benjamini-Hochberg at the module's false discovery rate (one-sided)."""
    from scipy.stats import norm

    p = norm.sf(z)
    order = np.argsort(p, kind="stable")
    passed = p[order] <= FALSE_DISCOVERY_RATE * np.arange(1, len(p) + 1) / len(p)
    keep = np.zeros(len(p), dtype=bool)
    if passed.any():
        keep[order[: int(np.flatnonzero(passed)[-1]) + 1]] = True
    return keep & (z > 0)


def trigger_tokens(
    fires: sparse.csr_matrix, token_ids: npt.NDArray[np.int64], showable: dict[int, str], *, top: int
) -> list[list[Term]]:
    """Per feature, the tokens on which it fires more often than on others, by the same z-score.

    fires: (tokens, F) boolean. showable: token id -> text, for the tokens that may be shown.
    """
    size = int(token_ids.max()) + 1
    rows = sparse.csr_matrix((np.ones(len(token_ids), dtype=np.float32), (token_ids, np.arange(len(token_ids)))))
    counts = np.asarray((rows @ fires.astype(np.float32)).todense())  # (token types, F)
    totals = np.bincount(token_ids, minlength=size).astype(np.float64)
    prior = totals * (500.0 / totals.sum()) + 0.01
    found = []
    for feature in range(fires.shape[1]):
        a = counts[:, feature]
        z = log_odds_z(a, totals - a, prior)
        keep = significant(z) & (a >= MIN_DOCUMENTS)
        terms: list[Term] = []
        for i in np.argsort(-z, kind="stable"):
            if len(terms) == top or z[i] <= 0:
                break
            if not keep[i]:  # one that is too rare may stand before others that are not
                continue
            text = showable.get(int(i), "").strip()
            if text and text not in (t.text for t in terms):
                terms.append(Term(text=text, z=round(float(z[i]), 2), documents=int(a[i])))
        found.append(terms)
    return found


def evidence(
    acts: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    token_ids: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    decode: Any,
    *,
    top: int,
    around: int = 12,
) -> list[Evidence]:
    """The passages of the project's own text on which a feature peaks, one a document.

    acts: (n,) its activation on the rows `rows` of the harvest; decode: ids -> text.
    """
    found: list[Evidence] = []
    seen: set[int] = set()
    for i in np.argsort(-acts, kind="stable"):
        if acts[i] <= 0 or len(found) == top:
            break
        document = int(documents[rows[i]])
        if document in seen:
            continue
        seen.add(document)
        first = last = int(rows[i])
        while first > 0 and documents[first - 1] == document and rows[i] - first < around:
            first -= 1
        while last + 1 < len(documents) and documents[last + 1] == document and last - rows[i] < around:
            last += 1
        found.append(
            Evidence(
                text=decode(token_ids[first : last + 1].tolist()).strip("\ufffd\n ").removeprefix("user\n"),
                peak=decode([int(token_ids[rows[i]])]).strip("\ufffd"),
                activation=round(float(acts[i]), 4),
            )
        )
    return found


def describe(triggers: Sequence[Term], ngrams: Sequence[Term], domains: Sequence[str], share_top: float) -> str:
    """One readable sentence made of exactly the terms that were found.

    share_top: the share of the feature's firing that its trigger tokens account for (its lexicality).
    """
    parts = []
    if triggers:
        kind = "Fires on the tokens" if share_top >= 0.5 else "Fires most on"
        parts.append(f"{kind} " + ", ".join(f"“{t.text}”" for t in triggers[:4]))
    new = [t for t in ngrams if t.text not in {x.text.lower() for x in triggers}][:4]
    if new:
        parts.append(("in text with " if parts else "Fires in text with ") + ", ".join(f"“{t.text}”" for t in new))
    if not parts:
        parts.append("Fires without a term that stands for it")
    tail = f"; goes with {', '.join(domains)}" if domains else ""
    return " ".join(parts) + tail + "."

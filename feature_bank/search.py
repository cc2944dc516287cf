"""Finding features: by filters on what is recorded of them, and by their texts with an index in memory.

The index is SQLite's FTS5. A search term is looked up at the beginnings of words. One that no word begins with, or that
is written in a script without spaces between words, is looked up anywhere in the text, by trigrams.
"""

from __future__ import annotations

import math
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feature_bank.errors import BankError, SailguardError
from feature_bank.review import EffectiveLabel, Status, known_concepts
from feature_bank.taxonomy import DOMAINS

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from feature_bank.schema import FeatureRecord, SimulationScore

__all__ = ["FeatureFilter", "Hit", "SearchIndex", "find_score", "main_fidelity", "score_names"]

MAX_QUERY, MAX_TERMS = 1000, 32  # characters and terms of a query
# What a match counts by the field it is in (bm25's weights).
_WEIGHTS = {"id": 10.0, "explanation": 4.0, "concepts": 4.0, "terms": 3.0, "promotes": 1.0, "evidence": 1.0}
_WORD = re.compile(r"[^\W_]+")
_TERM = re.compile(r'"([^"]*)"|(\S+)')
# Thai to Khmer, kana, Chinese characters, Hangul
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_TRIGRAM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFilter:
    """Which features are meant; what is None does not matter. Labels are the effective ones."""

    domain: str | None = None
    concept: str | None = None
    """A concept's id, with or without its domain before it: `election_campaign`, `politics/election_campaign`."""
    layer: int | None = None
    status: Status | None = None
    admitted: bool | None = None
    min_scores: Mapping[str, float] | None = None
    """Scores by the names of `find_score`. A feature without the score is not meant."""

    def check(self, bank: Bank) -> None:
        """Raise BankError for a domain, concept or score that the bank cannot have."""
        if self.domain is not None and self.domain not in DOMAINS:
            raise BankError(f"there is no domain {self.domain!r}; there are {', '.join(DOMAINS)}", field="domain")
        if self.concept is not None and self.concept not in known_concepts(bank):
            raise BankError(
                f"neither the taxonomy nor the bank knows the concept {self.concept!r}; "
                "`sailguard taxonomy list` names them",
                field="concept",
            )
        for name in self.min_scores or ():
            if name not in (known := score_names(bank)):
                raise BankError(f"the bank has no score {name!r}; it has {', '.join(known)}", field="min_scores")

    def select(self, bank: Bank, labels: Mapping[str, EffectiveLabel]) -> list[FeatureRecord]:
        """The features that are meant, in the bank's order. Raises what `check` raises."""
        self.check(bank)
        return [feature for feature in bank.features if self._holds(feature, labels[feature.id])]

    def _holds(self, feature: FeatureRecord, label: EffectiveLabel) -> bool:
        return (
            (self.domain is None or self.domain in label.domains)
            and (self.concept is None or any(_same_concept(self.concept, c) for c in label.concepts))
            and (self.layer is None or feature.layer == self.layer)
            and (self.status is None or label.status == self.status)
            and (self.admitted is None or feature.admitted == self.admitted)
            and all(
                (score := find_score(feature, name, label.domains, self.domain)) is not None and score >= least
                for name, least in (self.min_scores or {}).items()
            )
        )


def find_score(
    feature: FeatureRecord, name: str, domains: Iterable[str] | None = None, domain: str | None = None
) -> float | None:
    """A feature's score by name, or None if it has none.

    `auroc`: of `domain`, or the best of `domains` (the feature's own by default); `corr` and `corr_low`: of its
    explanation (see `main_fidelity`); `frequency`: of its best concept; `density`, `lexicality`; and any name in its
    `scores`.
    """
    if name == "auroc":
        wanted = [domain] if domain is not None else feature.domains if domains is None else domains
        return max((feature.scores[f"auroc_{d}"] for d in wanted if f"auroc_{d}" in feature.scores), default=None)
    if name in ("corr", "corr_low"):
        fidelity = main_fidelity(feature)
        return None if fidelity is None else fidelity.corr if name == "corr" else fidelity.corr_low
    if name == "frequency":
        return max((score.frequency for score in feature.concept_scores), default=None)
    if name in ("density", "lexicality"):
        value: float | None = getattr(feature, name)
        return value
    return feature.scores.get(name)


def main_fidelity(feature: FeatureRecord) -> SimulationScore | None:
    """The simulation score that stands for the others: the first at segment level, else the first of all."""
    return next((score for score in feature.fidelity if score.level == "segment"), next(iter(feature.fidelity), None))


def score_names(bank: Bank) -> list[str]:
    """The names of the scores that the bank's features have."""
    recorded = dict.fromkeys(name for feature in bank.features for name in feature.scores)
    general = ("auroc", "corr", "corr_low", "frequency", "density", "lexicality")
    present = [name for name in general if any(find_score(feature, name) is not None for feature in bank.features)]
    return [*present, *recorded]


@dataclass(frozen=True, slots=True)
class Hit:
    """A feature that a search found."""

    feature: FeatureRecord
    relevance: float
    """Sum over the terms of bm25, its sign turned: higher is better. Comparable within one search only."""
    fields: tuple[str, ...]
    """Where the terms stand: id, explanation, concepts, terms, promotes, evidence."""


class SearchIndex:
    """An index of a bank's texts in memory: ids, explanations, concepts, terms, promoted tokens, evidence."""

    def __init__(self, bank: Bank, labels: Mapping[str, EffectiveLabel]) -> None:
        self._features = bank.features
        self._texts = [tuple(_fold(text) for text in _texts(feature, labels[feature.id])) for feature in bank.features]
        self._database = sqlite3.connect(":memory:")
        self._tables: set[str] = set()

    def search(self, query: str) -> list[Hit]:
        """The features in which every term of the query occurs, best first.

        query: words, and phrases in double quotes; nothing else has a meaning of its own.

        Raises BankError for an empty query, or one that is too long.
        """
        terms = _split(query)
        found: dict[int, float] | None = None
        for term in terms:
            rows = self._find(term)
            found = rows if found is None else {row: found[row] + rows[row] for row in found if row in rows}
        ids = {term for term in terms if len(terms) == 1}
        hits = [(self._texts[row][0] in ids, relevance, row) for row, relevance in (found or {}).items()]
        hits.sort(key=lambda hit: (not hit[0], -hit[1], hit[2]))  # a feature's own id comes first
        return [Hit(self._features[row], relevance, self._fields(row, terms)) for _, relevance, row in hits]

    def _find(self, term: str) -> dict[int, float]:
        """Relevance by row of the features in which the term occurs."""
        found = {} if _UNSPACED.search(term) else self._match("words", f"{_quoted(term)}*")
        if not found and len(term) >= _TRIGRAM:
            found = self._match("pieces", _quoted(term))
        elif not found:
            found = self._contain(term)
        return found

    def _contain(self, term: str) -> dict[int, float]:
        """What `_match` gives, for a term that is too short for trigrams: rarity times the weights of its fields."""
        weights = {
            row: sum(weight for weight, text in zip(_WEIGHTS.values(), texts, strict=True) if term in text)
            for row, texts in enumerate(self._texts)
        }
        found = {row: weight for row, weight in weights.items() if weight}
        rarity = max(math.log((len(self._texts) - len(found) + 0.5) / (len(found) + 0.5)), 1e-6)
        return {row: weight * rarity for row, weight in found.items()}

    def _match(self, table: str, expression: str) -> dict[int, float]:
        self._fill(table)
        weights = ", ".join(map(str, _WEIGHTS.values()))
        rows = self._database.execute(
            f"SELECT rowid, -bm25({table}, {weights}) FROM {table} WHERE {table} MATCH ?", (expression,)
        )
        return {row: float(relevance) for row, relevance in rows}

    def _fill(self, table: str) -> None:
        """Make a table when it is first needed: the one of trigrams takes a few times as long as the one of words."""
        if table in self._tables:
            return
        tokenizer = {"words": "unicode61", "pieces": "trigram"}[table]
        places = ", ".join("?" * (1 + len(_WEIGHTS)))
        try:
            self._database.execute(
                f"CREATE VIRTUAL TABLE {table} USING fts5({', '.join(_WEIGHTS)}, tokenize='{tokenizer}')"
            )
        except sqlite3.OperationalError as e:
            raise SailguardError(
                f"this Python's SQLite ({sqlite3.sqlite_version}) cannot search: {e}; it takes 3.34 or later with FTS5"
            ) from e
        rows = ((row, *texts) for row, texts in enumerate(self._texts))
        self._database.executemany(f"INSERT INTO {table}(rowid, {', '.join(_WEIGHTS)}) VALUES ({places})", rows)
        self._tables.add(table)

    def _fields(self, row: int, terms: Iterable[str]) -> tuple[str, ...]:
        found: set[str] = set()
        for term in terms:
            pattern = r"[\W_]+".join(map(re.escape, _WORD.findall(term))) or re.escape(term)
            at_words = {name for name, text in self._named_texts(row) if re.search(rf"(?<![^\W_]){pattern}", text)}
            found |= at_words or {name for name, text in self._named_texts(row) if re.search(pattern, text)}
        return tuple(name for name in _WEIGHTS if name in found)

    def _named_texts(self, row: int) -> Iterable[tuple[str, str]]:
        return zip(_WEIGHTS, self._texts[row], strict=True)


def _texts(feature: FeatureRecord, label: EffectiveLabel) -> tuple[str, ...]:
    """A feature's texts in the order of `_WEIGHTS`. A text that a reviewer replaced is found too."""
    terms = [term.text for term in (*feature.trigger_tokens, *feature.ngrams)]
    terms += [term.text for term in feature.predicate.terms] if feature.predicate is not None else []
    concepts = dict.fromkeys((*label.concepts, *feature.concepts, *(s.concept for s in feature.concept_scores)))
    return (
        feature.id,
        "\n".join(dict.fromkeys((label.explanation, feature.explanation))),
        "\n".join(name for concept in concepts for name in (concept, concept.replace("_", " "))),
        "\n".join(terms),
        "\n".join(feature.promoted_tokens),
        "\n".join(evidence.text for evidence in feature.evidence),
    )


def _fold(text: str) -> str:
    """What makes two spellings one: width, case, accents; and no character that SQLite would trip over."""
    if text.isascii() and text.isprintable():
        return text.casefold()
    kept = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cs") else " "
        for c in unicodedata.normalize("NFKD", text)
        if not "\u0300" <= c <= "\u036f"
    )
    return unicodedata.normalize("NFC", kept).casefold()


def _split(query: str) -> list[str]:
    """The terms of a query, folded."""
    if len(query) > MAX_QUERY:
        raise BankError(f"the query is {len(query)} characters long; at most {MAX_QUERY} are taken", field="query")
    found = (" ".join((phrase or word).split()) for phrase, word in _TERM.findall(_fold(query)))
    terms = [term for term in dict.fromkeys(t.rstrip("*") for t in found) if term]
    if not terms:
        raise BankError("the query is empty; `sailguard bank list` shows all features", field="query")
    if len(terms) > MAX_TERMS:
        raise BankError(f"the query has {len(terms)} terms; at most {MAX_TERMS} are taken", field="query")
    return terms


def _quoted(term: str) -> str:
    """A term as an FTS5 string, in which no character has a meaning."""
    return '"' + term.replace('"', '""') + '"'


def _same_concept(wanted: str, concept: str) -> bool:
    return wanted in (concept, concept.rpartition("/")[2]) or wanted.rpartition("/")[2] == concept

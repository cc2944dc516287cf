"""Whether a taxonomy can teach what it says: enough of everything, minimal edits, and no shortcut between the sides.

A feature that separates the sides of the pairs should do so by the concept. If a text's length or its function words
told the sides apart, features of length or style would pass for features of the concept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import numpy.typing as npt

from feature_bank.taxonomy import Concept, DomainTaxonomy, Pair, Taxonomy

SUBTOPICS = (4, 6)
CONCEPTS = 25
PAIRS = 8  # of a concept, in English
CHINESE_PAIRS, CHINESE_CONCEPTS = 4, 10
HARD_NEGATIVES = 3
SIMILARITY = 0.5  # of the two word sequences of a pair
SHORTCUT_AUROC = 0.6
_FOLDS = 5

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a an the this that these those my your his her its our their i you he she it we they me him us them who whom
        which what when where why how and or but nor so yet if because while although though as than of in on at by
        for with about against between into through during before after above below to from up down out off over
        under again then once here there all any both each few more most other some such no not only own same too
        very can could will would shall should may might must do does did having have has had be am is are was were
        been being
        """,
    )
)
FUNCTION_CHARACTERS = frozenset(
    "的了在是我你他她它们这那和与或不也就都而及把被给对向从到为因所以但如果还要会能可很更最吗呢吧着过之其"
)


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """How well the sides of one domain's pairs are told apart without looking at what they say (0.5: not at all)."""

    domain: str
    lang: str
    pairs: int
    length_auroc: float
    function_words_auroc: float

    @property
    def findings(self) -> list[str]:
        """What is above the limit."""
        return [
            f"{self.domain}, {self.lang}: {what} tells the sides apart (AUROC {value:.3f}, at most {SHORTCUT_AUROC:g})"
            for what, value in (("length", self.length_auroc), ("a bag of function words", self.function_words_auroc))
            if value > SHORTCUT_AUROC
        ]


def words(text: str, lang: str) -> list[str]:
    """English words in lower case, or the characters of Chinese."""
    return re.findall(r"[a-z']+", text.lower()) if lang == "en" else [c for c in text if c.isalnum()]


def findings(taxonomy: Taxonomy) -> list[str]:
    """What is missing or out of balance, shortcuts aside; a line each."""
    return [line for domain in taxonomy.values() for line in _findings(domain)]


def shortcuts(taxonomy: Taxonomy) -> list[Shortcut]:
    """By domain and language: AUROC of the length in characters, and of a classifier of function words.

    The classifier (logistic regression on counts) judges pairs that it was not fitted to.
    """
    found = []
    for domain, record in taxonomy.items():
        for lang in ("en", "zh"):
            pairs = [pair for concept in record.concepts for pair in concept.pairs if pair.lang == lang]
            if len(pairs) >= 2 * _FOLDS:
                found.append(_shortcut(domain, lang, pairs))
    return found


def _findings(record: DomainTaxonomy) -> Iterator[str]:
    low, high = SUBTOPICS
    if not low <= len(record.subtopics) <= high:
        yield f"{record.domain}: {len(record.subtopics)} subtopics, expected {low} to {high}"
    if len(record.concepts) < CONCEPTS:
        yield f"{record.domain}: {len(record.concepts)} concepts, expected {CONCEPTS} at least"
    chinese = 0
    for concept in record.concepts:
        numbers = Counter(pair.lang for pair in concept.pairs)
        chinese += numbers["zh"] >= CHINESE_PAIRS
        for line in _concept_findings(concept):
            yield f"{record.domain}/{concept.id}: {line}"
    if chinese < CHINESE_CONCEPTS:
        yield f"{record.domain}: {chinese} concepts with {CHINESE_PAIRS} pairs in Chinese, expected {CHINESE_CONCEPTS}"


def _concept_findings(concept: Concept) -> Iterator[str]:
    numbers = Counter((pair.lang, pair.split) for pair in concept.pairs)
    english = numbers["en", "train"] + numbers["en", "test"]
    if english < PAIRS:
        yield f"{english} pairs in English, expected {PAIRS} at least"
    for lang in dict.fromkeys(pair.lang for pair in concept.pairs):
        for split in ("train", "test"):
            if not numbers[lang, split]:
                yield f"no pair in {lang} of the split {split!r}"
    if len(concept.hard_negatives) < HARD_NEGATIVES:
        yield f"{len(concept.hard_negatives)} hard negatives, expected {HARD_NEGATIVES} at least"
    for number, pair in enumerate(concept.pairs):
        alike = SequenceMatcher(None, words(pair.positive, pair.lang), words(pair.negative, pair.lang)).ratio()
        if alike < SIMILARITY:
            yield f"pair {number}: its sides share {alike:.0%} of their words; edit less ({pair.positive!r})"


def _shortcut(domain: str, lang: str, pairs: Sequence[Pair]) -> Shortcut:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    texts = [text for pair in pairs for text in (pair.positive, pair.negative)]
    truth = np.tile([1, 0], len(pairs))
    group = np.repeat(np.arange(len(pairs)), 2)
    length = float(roc_auc_score(truth, [len(text) for text in texts]))
    counted = _counts(texts, lang)
    score = np.zeros(len(texts))
    for fit, judged in GroupKFold(_FOLDS).split(counted, truth, group):
        model = LogisticRegression(C=0.1, max_iter=500).fit(counted[fit], truth[fit])
        score[judged] = model.decision_function(counted[judged])
    return Shortcut(
        domain=domain,
        lang=lang,
        pairs=len(pairs),
        length_auroc=max(length, 1 - length),
        function_words_auroc=float(roc_auc_score(truth, score)),
    )


def _counts(texts: Sequence[str], lang: str) -> npt.NDArray[np.float64]:
    vocabulary = sorted(FUNCTION_WORDS if lang == "en" else FUNCTION_CHARACTERS)
    counted = [Counter(words(text, lang)) for text in texts]
    return np.array([[count[word] for word in vocabulary] for count in counted], dtype=np.float64)

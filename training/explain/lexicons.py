"""For every concept of the taxonomy a small set of words that go with it, from what its contrast pairs differ in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from feature_bank.taxonomy import Concept, Domain, Pair, Taxonomy
from training.explain.terms import terms_of

LARGEST = 16  # words of one language


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """The words of a concept."""

    id: str
    """`domain/concept`"""
    name: str
    words: tuple[str, ...]
    """English words and pairs of Chinese characters, as `terms_of` gives them; sorted."""


def concept_lexicons(taxonomy: Taxonomy) -> dict[str, Lexicon]:
    """By `domain/concept`. Test pairs are not read.

    A word belongs to a concept if it stands in a text with the concept and not in its twin, and if it is more frequent
    in the concept's texts than in all texts without any concept of the domain. Those in most pairs come first.
    """
    found: dict[str, Lexicon] = {}
    for domain, record in taxonomy.items():
        without = Counter(word for text in _texts_without(taxonomy, domain) for word in set(_words(text)))
        within = Counter(
            word for concept in record.concepts for pair in _train(concept) for word in set(_words(pair.positive))
        )
        for concept in record.concepts:
            key = f"{domain}/{concept.id}"
            words = _distinguishing(concept, within, without)
            if words:
                found[key] = Lexicon(id=key, name=concept.name, words=words)
    return found


def _distinguishing(concept: Concept, within: Counter[str], without: Counter[str]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for pair in _train(concept):
        counts.update(set(_words(pair.positive)) - set(_words(pair.negative)))
    kept = sorted((w for w in counts if counts[w] > without[w]), key=lambda w: (-counts[w], -within[w], w))
    english = [w for w in kept if w.isascii()][:LARGEST]
    chinese = [w for w in kept if not w.isascii()][:LARGEST]
    return tuple(sorted(english + chinese))


def _texts_without(taxonomy: Taxonomy, domain: Domain) -> Iterator[str]:
    """All texts in which the domain is absent: twins, look-alikes, and what was written for other domains."""
    for other, record in taxonomy.items():
        for concept in record.concepts:
            for pair in _train(concept):
                yield pair.negative
                if other != domain:
                    yield pair.positive
            if other == domain:
                yield from (hard.text for hard in concept.hard_negatives)


def _train(concept: Concept) -> list[Pair]:
    return [pair for pair in concept.pairs if pair.split == "train"]


def _words(text: str) -> list[str]:
    return [term for term in terms_of(text) if " " not in term and (len(term) > 2 or not term.isascii())]

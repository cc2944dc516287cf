"""Which concepts of the taxonomy the bank's features stand for, and which are without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feature_bank.schema import FeatureRecord
from feature_bank.taxonomy import DOMAINS, Domain, Taxonomy

__all__ = ["ConceptIndex", "Covered", "DomainCoverage", "cover", "index_concepts"]


@dataclass(frozen=True, kw_only=True)
class Named:
    """A concept's place in the taxonomy."""

    domain: Domain
    subtopic: str
    name: str
    definition: str


ConceptIndex = dict[tuple[str, str], Named]
"""By domain and id."""


@dataclass(frozen=True, kw_only=True)
class Covered:
    """A concept and its features, those that tell its pairs apart most often first."""

    id: str
    subtopic: str
    name: str
    definition: str
    features: tuple[FeatureRecord, ...]


@dataclass(frozen=True, kw_only=True)
class DomainCoverage:
    """A domain's concepts, in the taxonomy's order; those that it does not know stand at the end."""

    domain: Domain
    concepts: tuple[Covered, ...]

    @property
    def covered(self) -> int:
        """Concepts with at least one feature."""
        return sum(bool(concept.features) for concept in self.concepts)


def index_concepts(taxonomy: Taxonomy) -> ConceptIndex:
    """Every concept of the taxonomy by its domain and id."""
    return {
        (domain, concept.id): Named(
            domain=domain, subtopic=subtopic.name, name=concept.name, definition=concept.definition
        )
        for domain, record in taxonomy.items()
        for subtopic in record.subtopics
        for concept in subtopic.concepts
    }


def cover(features: Sequence[FeatureRecord], index: ConceptIndex) -> tuple[DomainCoverage, ...]:
    """The concepts of each domain with their features. Empty if no feature names a concept."""
    members: dict[tuple[str, str], list[FeatureRecord]] = {}
    for feature in features:
        for label in feature.concepts:
            for key in _places(feature, label, index):
                members.setdefault(key, []).append(feature)
    if not members:
        return ()
    found = []
    for domain in DOMAINS:
        keys = [key for key in index if key[0] == domain]
        keys += sorted(key for key in members if key[0] == domain and key not in index)
        if keys:
            found.append(
                DomainCoverage(
                    domain=domain, concepts=tuple(_covered(key, members.get(key, []), index) for key in keys)
                )
            )
    return tuple(found)


def _places(feature: FeatureRecord, label: str, index: ConceptIndex) -> list[tuple[str, str]]:
    """A label is a concept's id, with or without its domain before a slash; ids are unique in a domain alone."""
    domain, slash, concept = label.partition("/")
    if slash and domain in DOMAINS:
        return [(domain, concept)]
    places: list[tuple[str, str]] = [(d, label) for d in feature.domains]
    return [place for place in places if place in index] or places


def _covered(key: tuple[str, str], features: Sequence[FeatureRecord], index: ConceptIndex) -> Covered:
    named = index.get(key)

    def rank(feature: FeatureRecord) -> float:
        same = (s.frequency for s in feature.concept_scores if (s.domain, s.concept) == key)
        return -next(same, 0.0)

    return Covered(
        id=key[1],
        subtopic=named.subtopic if named else "not in the taxonomy",
        name=named.name if named else key[1],
        definition=named.definition if named else "",
        features=tuple(sorted(features, key=rank)),
    )

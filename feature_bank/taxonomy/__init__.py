"""The four domains, and under each its subtopics, concepts and concept-contrastive pairs, as data."""

from __future__ import annotations

from feature_bank.taxonomy.domains import DOMAINS, Domain
from feature_bank.taxonomy.files import Taxonomy, load_taxonomy, normalised, taxonomy_files
from feature_bank.taxonomy.records import Concept, DomainTaxonomy, HardNegative, Pair, Subtopic

__all__ = [
    "DOMAINS",
    "Concept",
    "Domain",
    "DomainTaxonomy",
    "HardNegative",
    "Pair",
    "Subtopic",
    "Taxonomy",
    "load_taxonomy",
    "normalised",
    "taxonomy_files",
]

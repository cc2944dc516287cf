"""What an explainer is given and what it gives back, whoever it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from feature_bank.schema import Explainer, Predicate

Reason = Literal["random", "same_domain", "lookalike", "contrast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of 8 to 32 tokens of one document."""

    document: int
    """Row in the list of documents."""
    start: int
    stop: int
    """Rows of the harvest, [start, stop)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A segment as an explainer reads it."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """The feature's normalised activation on each token."""
    reason: Reason | None = None
    """Of a negative: why it was chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureEvidence:
    """What an explainer may see of a feature. Never text of the test split."""

    id: str
    positives: tuple[Excerpt, ...]
    """Segments on which it fires, from the strongest tenth of its activations down."""
    negatives: tuple[Excerpt, ...]
    promoted_tokens: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    """Concepts of the taxonomy whose contrast pairs it tells apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Text that a person reads, and how it came about."""

    text: str
    explainer: Explainer
    predicate: Predicate | None = None


class FeatureExplainer(Protocol):
    """An explainer that reads excerpts. A feature without a usable answer is missing from the result."""

    def explain(self, evidence: Sequence[FeatureEvidence]) -> dict[str, Explanation]:
        """Explanations by feature id."""
        ...

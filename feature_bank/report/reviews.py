"""What people said of a bank's features, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from feature_bank.review import load_reviews
from feature_bank.schema import FeatureRecord
from feature_bank.taxonomy import Domain
from feature_bank.verdicts import Overrides

__all__ = ["ReviewLine", "Reviews", "in_force", "read_reviews"]


@dataclass(frozen=True, kw_only=True)
class ReviewLine:
    """One review of a feature. The labels that it puts in the place of the machine's are None where it leaves them."""

    verdict: str
    """`accept`, `reject`, `relabel` or `note`."""
    reviewer: str
    time: str
    reason: str = ""
    domains: tuple[Domain, ...] | None = None
    concepts: tuple[str, ...] | None = None
    explanation: str | None = None


Reviews = Mapping[str, tuple[ReviewLine, ...]]
"""Reviews by feature id, oldest first."""


def read_reviews(folder: Path) -> Reviews:
    """The reviews of the bank in `folder`. Raises BankError naming line and field for a malformed one."""
    lines: dict[str, tuple[ReviewLine, ...]] = {}
    for review in load_reviews(folder).reviews:
        changes = review.overrides or Overrides()
        line = ReviewLine(
            verdict=review.verdict,
            reviewer=review.reviewer,
            time=review.time,
            reason=review.reason,
            domains=None if changes.domains is None else tuple(changes.domains),
            concepts=None if changes.concepts is None else tuple(changes.concepts),
            explanation=changes.explanation,
        )
        lines[review.feature] = (*lines.get(review.feature, ()), line)
    return lines


def in_force(record: FeatureRecord, lines: Sequence[ReviewLine]) -> FeatureRecord:
    """The record with the labels that hold: field by field the last review that sets it, else the machine's."""
    labels: dict[str, object] = {}
    for line in lines:
        if line.domains is not None:
            labels["domains"] = list(line.domains)
        if line.concepts is not None:
            labels["concepts"] = list(line.concepts)
        if line.explanation is not None:
            labels["explanation"] = line.explanation
    return record.model_copy(update=labels) if labels else record

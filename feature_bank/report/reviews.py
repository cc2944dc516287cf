"""What people said of a bank's features, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReviewLine", "Reviews", "read_reviews"]


@dataclass(frozen=True, kw_only=True)
class ReviewLine:
    """One review of a feature."""

    verdict: str
    """Such as `accept`, `reject`, `relabel` or `note`."""
    reviewer: str
    time: str
    reason: str = ""
    changes: str = ""
    """What it says instead of the record: other domains, concepts or another explanation."""


Reviews = Mapping[str, tuple[ReviewLine, ...]]
"""Reviews by feature id, oldest first."""


def read_reviews(folder: Path) -> Reviews:  # noqa: ARG001  # nothing is read yet
    """The reviews of the bank in `folder`. None are read yet."""
    return {}

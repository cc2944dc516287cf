"""The bank in use with its reviews, searched and sorted, on a thread of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.bank import Bank
from feature_bank.errors import BankError
from feature_bank.review import EffectiveLabel, ReviewLog, effective, load_reviews, review_file
from feature_bank.schema import FeatureRecord
from feature_bank.search import FeatureFilter, SearchIndex, find_score
from service.schemas_features import FeatureSummary, SortKey

if TYPE_CHECKING:
    from starlette.requests import Request

    from service.watched import Signature

__all__ = ["Catalogue", "View"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A bank with its reviews, ready to be searched."""

    key: tuple[str, Signature]
    log: ReviewLog
    labels: Mapping[str, EffectiveLabel]
    index: SearchIndex


class Catalogue:
    """The index of the bank in use, made when it is first asked for and again when the bank or its reviews change.

    It lives on a thread of its own: an SQLite database belongs to the thread that made it, and a long search must not
    keep the event loop.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sailguard-features")
        self._view: View | None = None

    @classmethod
    def of(cls, request: Request) -> Catalogue:
        """The catalogue of the application that serves `request`."""
        state = request.app.state
        if not hasattr(state, "feature_catalogue"):
            state.feature_catalogue = cls()
        catalogue = state.feature_catalogue
        assert isinstance(catalogue, cls)
        return catalogue

    async def view(self, bank: Bank, place: Path) -> View:
        """The bank with its reviews. place: where the bank lies, for its reviews."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._current, bank, place)

    async def find(
        self, bank: Bank, place: Path, wanted: FeatureFilter, query: str | None, sort: SortKey | None = None
    ) -> list[FeatureSummary]:
        """The features that are wanted and that the query finds, in the order of `sort`: by relevance, or without a
        query by `auroc`, if it is left out. Raises BankError for what cannot be looked for."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: _sorted(_find(bank, self._current(bank, place), wanted, query), query, sort)
        )

    def _current(self, bank: Bank, place: Path) -> View:
        key = (bank.content_hash, _signature(place))
        if self._view is None or self._view.key != key:
            log, labels = _labels(bank, place)
            self._view = View(key=key, log=log, labels=labels, index=SearchIndex(bank, labels))
        return self._view


def _find(bank: Bank, view: View, wanted: FeatureFilter, query: str | None) -> list[FeatureSummary]:
    try:
        kept = {feature.id: feature for feature in wanted.select(bank, view.labels)}
    except BankError as error:
        if error.field != "min_scores":
            raise
        kept = {}  # none of the bank's features has the score, so none has enough of it
    if query is not None:
        hits = [hit for hit in view.index.search(query) if hit.feature.id in kept]
        return [_summary(hit.feature, view, wanted.domain, hit.relevance, hit.fields) for hit in hits]
    return [_summary(feature, view, wanted.domain) for feature in kept.values()]


def _sorted(found: list[FeatureSummary], query: str | None, sort: SortKey | None) -> list[FeatureSummary]:
    if sort is None and query is not None:
        return found
    # Sorting is stable: equals stay in the order of relevance, or of the bank.
    return sorted(found, key=_ORDERS[sort or "auroc"])


def _descending(value: float | None) -> float:
    return math.inf if value is None else -value


_ORDERS: Mapping[SortKey, Callable[[FeatureSummary], Any]] = {
    "auroc": lambda one: _descending(one.auroc),
    "fidelity": lambda one: _descending(one.fidelity),
    "density": lambda one: _descending(one.density),
    "id": lambda one: (one.layer, one.index),
    "layer": lambda one: (one.layer, _descending(one.auroc)),
}
"""Scores from the highest on, what has none at the end; ids and layers from the lowest on."""


def _summary(
    feature: FeatureRecord,
    view: View,
    domain: str | None,
    relevance: float | None = None,
    found_in: Sequence[str] | None = None,
) -> FeatureSummary:
    label = view.labels[feature.id]
    return FeatureSummary(
        id=feature.id,
        hook_name=feature.hook_name,
        layer=feature.layer,
        index=feature.index,
        domains=list(label.domains),
        concepts=list(label.concepts),
        explanation=label.explanation,
        status=label.status,
        admitted=feature.admitted,
        kind=feature.kind,
        direction=feature.direction,
        auroc=find_score(feature, "auroc", label.domains, domain),
        fidelity=find_score(feature, "corr"),
        density=feature.density,
        relevance=relevance,
        found_in=None if found_in is None else list(found_in),
    )


def _labels(bank: Bank, place: Path) -> tuple[ReviewLog, dict[str, EffectiveLabel]]:
    """The reviews and what follows from them; without reviews if they cannot be read, for the bank can be."""
    try:
        log = load_reviews(place)
        return log, effective(bank, log.reviews)
    except (BankError, OSError):
        return ReviewLog(), effective(bank, ())


def _signature(place: Path) -> tuple[Any, ...]:
    try:
        found = review_file(place).stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

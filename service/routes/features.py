"""`GET /v1/features`: the bank's features, searched and shown with what reviewers say of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel
from starlette.responses import Response

from feature_bank.bank import Bank
from feature_bank.errors import BankError
from feature_bank.review import EffectiveLabel, ReviewLog, effective, load_reviews, review_file
from feature_bank.schema import FeatureRecord
from feature_bank.search import MAX_QUERY, FeatureFilter, SearchIndex, find_score
from feature_bank.taxonomy import Domain
from feature_bank.verdicts import Review
from service.errors import ApiError, AsciiJSONResponse
from service.schemas_errors import ERRORS
from service.services import Services

if TYPE_CHECKING:
    from service.watched import Signature

__all__ = ["router"]

router = APIRouter(prefix="/v1/features", tags=["features"], responses=ERRORS)

MAX_LIMIT = 100
_MAX_ID = 40


class Label(BaseModel):
    """What holds of a feature after its reviews."""

    domains: list[str]
    concepts: list[str]
    explanation: str
    status: Literal["unreviewed", "accepted", "rejected"]
    reviewer: str | None
    time: str | None


class FeatureSummary(BaseModel):
    """One feature of a list. Domains, concepts and explanation are those that reviews left."""

    id: str
    hook_name: str
    layer: int
    index: int
    domains: list[str]
    concepts: list[str]
    explanation: str
    status: Literal["unreviewed", "accepted", "rejected"]
    admitted: bool
    auroc: float | None
    density: float
    relevance: float | None
    found_in: list[str] | None


class FeatureList(BaseModel):
    """A page of features: best matches first, without a query those that find their domain best."""

    object: Literal["list"] = "list"
    data: list[FeatureSummary]
    total: int
    limit: int
    offset: int
    bank: str


class FeatureDetail(BaseModel):
    """All that the bank holds of a feature, and its reviews."""

    object: Literal["feature"] = "feature"
    bank: str
    feature: FeatureRecord
    effective: Label
    reviews: list[Review]


@router.get("", summary="Search the bank's features", response_model=FeatureList)
async def list_features(
    request: Request,
    q: Annotated[
        str | None, Query(max_length=MAX_QUERY, description="Words, and phrases in double quotes; all must occur.")
    ] = None,
    domain: Annotated[Domain | None, Query(description="Only features tagged with this domain.")] = None,
    concept: Annotated[str | None, Query(max_length=200, description="Only features tagged with this concept.")] = None,
    layer: Annotated[int | None, Query(ge=0, le=10_000, description="Only features of this layer.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Response:
    """Features by their texts (id, explanation, concepts, terms, promoted tokens, evidence) and tags."""
    services = Services.of(request)
    bank = services.engine().bank
    wanted = FeatureFilter(domain=domain, concept=concept, layer=layer)
    catalogue = _Catalogue.of(request)
    try:
        found = await catalogue.find(bank, services.reloader.files.bank, wanted, q if q and q.strip() else None)
    except BankError as error:
        if error.field == "concept":
            raise ApiError(404, f"{error.message}.", param="concept", code="concept_not_found") from error
        raise ApiError(400, f"q: {error.message}.", param="q", code="invalid_value") from error
    page = FeatureList(
        data=found[offset : offset + limit], total=len(found), limit=limit, offset=offset, bank=bank.version
    )
    return AsciiJSONResponse(page.model_dump(mode="json"))


@router.get("/{feature_id:path}", summary="Show one feature", response_model=FeatureDetail)
async def get_feature(
    request: Request,
    feature_id: Annotated[str, PathParameter(description="The feature's id, such as `L14/2031`.")],
) -> Response:
    """Explanation, domains, concepts, scores, quantiles, promoted tokens, evidence and reviews."""
    services = Services.of(request)
    bank = services.engine().bank
    if feature_id not in bank.by_id:
        message = f"The bank {bank.version} has no feature {feature_id[:_MAX_ID]!r}; GET /v1/features lists them."
        raise ApiError(404, message, param="feature_id", code="feature_not_found")
    view = await _Catalogue.of(request).view(bank, services.reloader.files.bank)
    detail = FeatureDetail(
        bank=bank.version,
        feature=bank.by_id[feature_id],
        effective=Label.model_validate(asdict(view.labels[feature_id])),
        reviews=[review for review in view.log.reviews if review.feature == feature_id],
    )
    return AsciiJSONResponse(detail.model_dump(mode="json"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A bank with its reviews, ready to be searched."""

    key: tuple[str, Signature]
    log: ReviewLog
    labels: Mapping[str, EffectiveLabel]
    index: SearchIndex


class _Catalogue:
    """The index of the bank in use, made when it is first asked for and again when the bank or its reviews change.

    It lives on a thread of its own: an SQLite database belongs to the thread that made it, and a long search must not
    keep the event loop.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sailguard-features")
        self._view: _View | None = None

    @classmethod
    def of(cls, request: Request) -> _Catalogue:
        """The catalogue of the application that serves `request`."""
        state = request.app.state
        if not hasattr(state, "feature_catalogue"):
            state.feature_catalogue = cls()
        catalogue = state.feature_catalogue
        assert isinstance(catalogue, cls)
        return catalogue

    async def view(self, bank: Bank, place: Path) -> _View:
        """The bank with its reviews. place: where the bank lies, for its reviews."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._current, bank, place)

    async def find(self, bank: Bank, place: Path, wanted: FeatureFilter, query: str | None) -> list[FeatureSummary]:
        """The features that are wanted and that the query finds. Raises BankError for what cannot be looked for."""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: _find(bank, self._current(bank, place), wanted, query)
        )

    def _current(self, bank: Bank, place: Path) -> _View:
        key = (bank.content_hash, _signature(place))
        if self._view is None or self._view.key != key:
            log, labels = _labels(bank, place)
            self._view = _View(key=key, log=log, labels=labels, index=SearchIndex(bank, labels))
        return self._view


def _find(bank: Bank, view: _View, wanted: FeatureFilter, query: str | None) -> list[FeatureSummary]:
    kept = {feature.id: feature for feature in wanted.select(bank, view.labels)}
    if query is not None:
        hits = [hit for hit in view.index.search(query) if hit.feature.id in kept]
        return [_summary(hit.feature, view, wanted.domain, hit.relevance, hit.fields) for hit in hits]
    found = [_summary(feature, view, wanted.domain) for feature in kept.values()]
    return sorted(found, key=lambda summary: -(summary.auroc or 0.0))  # stable: the bank's order between equals


def _summary(
    feature: FeatureRecord,
    view: _View,
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
        auroc=find_score(feature, "auroc", label.domains, domain),
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

"""`GET /v1/features`: the bank's features, searched and shown with what reviewers say of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from starlette.responses import Response

from feature_bank.errors import BankError
from feature_bank.search import MAX_QUERY, FeatureFilter
from feature_bank.taxonomy import Domain
from service.catalogue import Catalogue
from service.errors import ApiError, AsciiJSONResponse
from service.schemas_errors import ERRORS
from service.schemas_features import FeatureDetail, FeatureList, HeadPart, Label, SortKey, Status
from service.services import Services

if TYPE_CHECKING:
    from feature_bank.bank import Bank

__all__ = ["feature_not_found", "router"]

router = APIRouter(prefix="/v1/features", tags=["features"], responses=ERRORS)

MAX_LIMIT = 1000
_MAX_ID = 40


@router.get("", summary="Search the bank's features", response_model=FeatureList)
async def list_features(
    request: Request,
    q: Annotated[
        str | None, Query(max_length=MAX_QUERY, description="Words, and phrases in double quotes; all must occur.")
    ] = None,
    domain: Annotated[Domain | None, Query(description="Only features tagged with this domain.")] = None,
    concept: Annotated[str | None, Query(max_length=200, description="Only features tagged with this concept.")] = None,
    layer: Annotated[int | None, Query(ge=0, le=10_000, description="Only features of this layer.")] = None,
    status: Annotated[Status | None, Query(description="Only features whose reviews leave them so.")] = None,
    min_auroc: Annotated[
        float | None, Query(ge=0.0, le=1.0, description="Only features that find a domain at least this well.")
    ] = None,
    admitted: Annotated[bool | None, Query(description="Whether the preset's rules let the feature in.")] = None,
    sort: Annotated[
        SortKey | None, Query(description="Scores: highest first. Without it by relevance, or by `auroc`.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 20,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Response:
    """Features by their texts (id, explanation, concepts, terms, promoted tokens, evidence) and tags."""
    services = Services.of(request)
    bank = services.engine().bank
    wanted = FeatureFilter(
        domain=domain,
        concept=concept,
        layer=layer,
        status=status,
        admitted=admitted,
        min_scores=None if min_auroc is None else {"auroc": min_auroc},
    )
    place, query = services.reloader.files.bank, q if q and q.strip() else None
    try:
        found = await Catalogue.of(request).find(bank, place, wanted, query, sort)
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
        raise feature_not_found(feature_id, bank.version, "feature_id")
    view = await Catalogue.of(request).view(bank, services.reloader.files.bank)
    detail = FeatureDetail(
        bank=bank.version,
        feature=bank.by_id[feature_id],
        heads=_head_parts(bank, feature_id),
        effective=Label.model_validate(asdict(view.labels[feature_id])),
        reviews=[review for review in view.log.reviews if review.feature == feature_id],
    )
    return AsciiJSONResponse(detail.model_dump(mode="json"))


def _head_parts(bank: Bank, feature_id: str) -> dict[str, HeadPart]:
    """The feature's weight and share of the mean difference in the heads that hold it, by domain."""
    found = {}
    for domain, head in bank.heads.items():
        for name, weight, share in zip(head.features, head.weights, head.steering, strict=True):
            if name == feature_id:
                found[domain] = HeadPart(weight=weight, steering=share)
    return found


def feature_not_found(feature_id: str, bank: str, param: str) -> ApiError:
    """404 for a feature that the bank does not have."""
    message = f"The bank {bank} has no feature {feature_id[:_MAX_ID]!r}; GET /v1/features lists them."
    return ApiError(404, message, param=param, code="feature_not_found")

"""`POST /admin/reviews`: what a person says of a feature is added to the reviews of the bank in use."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from feature_bank.errors import BankError
from feature_bank.review import append_reviews
from service.auth import principal_of, require_admin
from service.catalogue import Catalogue
from service.errors import ApiError, AsciiJSONResponse
from service.middleware import JsonRoute, Record
from service.routes.features import feature_not_found
from service.schemas_audit import Reviewed, ReviewRequest
from service.schemas_errors import ERRORS
from service.schemas_features import Label
from service.services import Services

__all__ = ["router"]

router = APIRouter(
    prefix="/admin/reviews",
    route_class=JsonRoute,
    tags=["admin"],
    responses=ERRORS,
    dependencies=[Depends(require_admin)],
)


@router.post("", summary="Review a feature", response_model=Reviewed)
async def add_review(body: ReviewRequest, request: Request) -> Response:
    """Add a review to the bank's log, from which nothing is ever taken out: a further review undoes it."""
    services = Services.of(request)
    bank, place = services.engine().bank, services.reloader.files.bank
    if body.feature not in bank.by_id:
        raise feature_not_found(body.feature, bank.version, "feature")
    try:
        (review,) = await asyncio.to_thread(append_reviews, place, [body.draft()], bank=bank)
    except BankError as error:
        if error.field == "concepts":
            param = "overrides.concepts"
            raise ApiError(404, f"{error.message}.", param=param, code="concept_not_found") from error
        raise ApiError(409, f"The review was not added: {error}.", code="refused") from error
    except OSError as error:
        message = (
            f"The reviews of the server's bank cannot be written ({error.strerror}): "
            "run the server as a user who may write its folder, or use a copy of the bank."
        )
        raise ApiError(409, message, code="bank_not_writable") from error
    principal = principal_of(request)
    services.reloader.logger.info(
        "admin",
        action="review",
        key_id=None if principal is None else principal.key_id,
        request_id=Record.of(request).request_id,
        feature=review.feature,
        verdict=review.verdict,
    )
    view = await Catalogue.of(request).view(bank, place)
    effective = Label.model_validate(asdict(view.labels[review.feature]))
    return AsciiJSONResponse(Reviewed(review=review, effective=effective).model_dump(mode="json"))

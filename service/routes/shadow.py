"""`/admin/shadow`: a candidate bank beside the one in use, and on what the two disagree."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from feature_bank.bank import Bank
from feature_bank.errors import SailguardError
from feature_bank.versions import VERSIONS
from service.auth import require_admin
from service.bank_versions import store_at
from service.errors import ApiError, AsciiJSONResponse
from service.middleware import JsonRoute
from service.schemas_errors import ERRORS
from service.schemas_shadow import ShadowReport, ShadowRequest
from service.services import Services
from service.shadow import load_candidate

__all__ = ["router"]

router = APIRouter(
    prefix="/admin", route_class=JsonRoute, tags=["admin"], responses=ERRORS, dependencies=[Depends(require_admin)]
)


@router.get("/shadow", summary="Show what a candidate bank decides differently", response_model=ShadowReport)
async def get_shadow(request: Request) -> Response:
    """Counts, rates with intervals and the latest disagreements, without texts, of the process that answers."""
    services = Services.of(request)
    return _report(services, services.engine().bank)


@router.post("/shadow", summary="Put a candidate bank beside the one in use, or end it", response_model=ShadowReport)
async def set_shadow(body: ShadowRequest, request: Request) -> Response:
    """The candidate is a version in the server's store. It judges what is judged anyway and never acts."""
    services = Services.of(request)
    current = services.engine().bank
    if body.version is None:
        services.shadow.stop()
        return _report(services, current)
    store = store_at(services.reloader.files.bank)
    if store is None:
        message = (
            "The server's bank is no folder of versions: start the server with one, or give the candidate to "
            "`sailguard serve --shadow BANK`."
        )
        raise ApiError(409, message, code="no_bank_store")
    wanted = body.version
    try:
        name = await asyncio.to_thread(store.chosen, wanted)
    except (SailguardError, OSError) as error:
        raise ApiError(404, f"{error}.", param="version", code="version_not_found") from error
    try:
        candidate = await asyncio.to_thread(load_candidate, store.folder / VERSIONS / name, current)
    except (SailguardError, OSError) as error:
        raise ApiError(409, f"{type(error).__name__}: {error}", code="refused") from error
    services.shadow.start(candidate)
    return _report(services, current)


def _report(services: Services, current: Bank) -> Response:
    status = services.shadow.status()
    promote = None
    if status is not None and status.stopped is None and status.candidate != current.version:
        in_store = store_at(services.reloader.files.bank) is not None
        promote = (
            f'POST /admin/bank/promote {{"version": "{status.candidate}"}}, once it is in the store: '
            "sailguard bank promote CANDIDATE --store DIR"
            if in_store
            else "sailguard bank promote CANDIDATE --store DIR, and serve that folder"
        )
    report = ShadowReport(current=current.version, shadow=status, promote=promote)
    return AsciiJSONResponse(report.model_dump(mode="json"))

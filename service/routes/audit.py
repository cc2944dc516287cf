"""`GET /admin/audit` and `/admin/audit/history`: what the audit holds, the newest first, and a minute at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from service.audit_queries import history, latest
from service.audit_store import AuditError, Selection
from service.auth import require_admin
from service.errors import ApiError, AsciiJSONResponse
from service.schemas_audit import AuditHistory, AuditList
from service.schemas_errors import ERRORS
from service.services import Services

__all__ = ["router"]

T = TypeVar("T")

router = APIRouter(prefix="/admin/audit", tags=["admin"], responses=ERRORS, dependencies=[Depends(require_admin)])

MAX_LIMIT = 500
MAX_MINUTES = 24 * 60
_LATEST_TIME = 253_402_300_800.0  # the year 10000
_LARGEST_ID = 2**53  # what JavaScript counts to


@router.get("", summary="Show what the audit holds", response_model=AuditList)
async def list_audit(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 50,
    before: Annotated[int | None, Query(ge=0, le=_LARGEST_ID, description="Only entries with a smaller id.")] = None,
    action: Annotated[Literal["flag", "steer", "block"] | None, Query(description="Only this action.")] = None,
    domain: Annotated[str | None, Query(max_length=200, description="Only verdicts about this domain.")] = None,
    request_id: Annotated[str | None, Query(max_length=200, description="Only those of this request.")] = None,
    since: Annotated[
        float | None, Query(ge=0.0, le=_LATEST_TIME, description="Only from then on, in seconds since 1970.")
    ] = None,
) -> Response:
    """Entries, the newest first; the last one's id, as `before`, asks for the next page."""
    path = _file(request)
    selection = Selection(since=since, action=action, domain=domain, request_id=request_id)
    entries = await _read(lambda: latest(path, selection, limit=limit, before=before))
    shown = AuditList.model_validate({"data": entries, "kept": Services.of(request).settings.audit_text})
    return AsciiJSONResponse(shown.model_dump(mode="json"))


@router.get("/history", summary="Count the audit's verdicts by the minute", response_model=AuditHistory)
async def get_history(
    request: Request, minutes: Annotated[int, Query(ge=1, le=MAX_MINUTES, description="How far back.")] = 60
) -> Response:
    """Verdicts a minute by domain and action, and the features that came up most."""
    path, domains = _file(request), tuple(Services.of(request).engine().bank.heads)
    found = await _read(lambda: history(path, minutes=minutes, now=time.time(), domains=domains))
    content = AuditHistory.model_validate({"minutes": minutes, **asdict(found)})
    return AsciiJSONResponse(content.model_dump(mode="json"))


def _file(request: Request) -> Path:
    path = Services.of(request).settings.audit
    if path is None:
        message = "The server keeps no audit: start it with --audit FILE, and verdicts other than allow are kept there."
        raise ApiError(409, message, code="no_audit")
    return path


async def _read(work: Callable[[], T]) -> T:
    """What `work` reads, in a thread: the file may be large, and its disk slow."""
    try:
        return await asyncio.to_thread(work)
    except AuditError as error:
        raise ApiError(409, f"{error}.", code="audit_not_readable") from error

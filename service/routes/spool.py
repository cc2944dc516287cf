"""`/admin/spool`: what the spool holds, the newest first, and marks on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath
from starlette.responses import Response

from feature_bank.spool import Mark, Selection, Spool, SpoolError, SpoolItem, iso
from service.auth import principal_of, require_admin
from service.errors import ApiError, AsciiJSONResponse
from service.middleware import JsonRoute, Record
from service.schemas_errors import ERRORS
from service.schemas_spool import Marked, MarkRequest, ShownMark, SpooledItem, SpoolList
from service.services import Services

__all__ = ["router"]

T = TypeVar("T")

router = APIRouter(
    prefix="/admin/spool",
    route_class=JsonRoute,
    tags=["admin"],
    responses=ERRORS,
    dependencies=[Depends(require_admin)],
)

MAX_LIMIT = 500
_LARGEST_ID = 2**53  # what JavaScript counts to


@router.get("", summary="Show what the spool holds", response_model=SpoolList)
async def list_spool(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 50,
    before: Annotated[int | None, Query(ge=0, le=_LARGEST_ID, description="Only items with a smaller id.")] = None,
    why: Annotated[Literal["sampled", "verdict"] | None, Query(description="Why they are kept.")] = None,
    phase: Annotated[Literal["prompt", "response"] | None, Query(description="Only this phase.")] = None,
    choice: Annotated[int | None, Query(ge=0, le=_LARGEST_ID, description="Only this choice or text.")] = None,
    flagged: Annotated[str | None, Query(max_length=200, description="Only those flagged for this domain.")] = None,
    marked: Annotated[bool | None, Query(description="Only those with marks, or without.")] = None,
    request_id: Annotated[str | None, Query(max_length=200, description="Only those of this request.")] = None,
) -> Response:
    """Items without their activations, the newest first; the last one's id, as `before`, asks for the next page."""
    path = _file(request)
    selection = Selection(why=why, phase=phase, choice=choice, flagged=flagged, marked=marked, request_id=request_id)

    def read() -> list[SpooledItem]:
        with Spool.open_for_reading(path) as spool:
            found = spool.newest(selection, limit=limit, before=before)
            return [_shown(item, spool.marks(item.id or 0)) for item in found]

    shown = SpoolList(data=await _answered(read), kept=Services.of(request).settings.spool_text)
    return AsciiJSONResponse(shown.model_dump(mode="json"))


@router.post("/{item}/marks", summary="Mark a judgement", response_model=Marked)
async def add_mark(
    body: MarkRequest,
    request: Request,
    item: Annotated[int, InPath(ge=1, le=_LARGEST_ID, description="The item's id.")],
) -> Response:
    """Add a mark, which is never taken out again: a further one for the same domain counts in its place."""
    path = _file(request)

    def mark() -> Mark:
        with Spool.open_existing(path) as spool:
            found = spool.item(item)
            if found is None:
                raise ApiError(404, f"There is no item {item} in the spool.", param="item", code="item_not_found")
            if body.domain not in found.scores:
                message = f"Item {item} was not judged for {body.domain!r}, but for {', '.join(found.scores)}."
                raise ApiError(404, message, param="domain", code="domain_not_found")
            return spool.mark(item, body.domain, body.mark, reviewer=body.reviewer, reason=body.reason)

    made = await _answered(mark)
    principal = principal_of(request)
    Services.of(request).reloader.logger.info(
        "admin",
        action="mark",
        key_id=None if principal is None else principal.key_id,
        request_id=Record.of(request).request_id,
        item=item,
        domain=made.domain,
        mark=made.mark,
    )
    return AsciiJSONResponse(Marked(mark=_mark(made)).model_dump(mode="json"))


def _file(request: Request) -> Path:
    path = Services.of(request).settings.spool
    if path is None:
        message = "The server keeps no spool: start it with --spool FILE, and a sample of what it judges is kept there."
        raise ApiError(409, message, code="no_spool")
    return path


async def _answered(work: Callable[[], T]) -> T:
    """What `work` returns, in a thread: the file may be large, and its disk slow."""
    try:
        return await asyncio.to_thread(work)
    except SpoolError as error:
        raise ApiError(409, f"{error}.", code="spool_not_usable") from error


def _shown(item: SpoolItem, marks: list[Mark]) -> SpooledItem:
    names = set(SpooledItem.model_fields) - {"time", "marks", "flagged", "scores"}
    return SpooledItem(
        **{name: getattr(item, name) for name in names},
        time=iso(item.unix),
        scores=dict(item.scores),
        flagged=list(item.flagged),
        marks=[_mark(mark) for mark in marks],
    )


def _mark(mark: Mark) -> ShownMark:
    names = set(ShownMark.model_fields) - {"time"}
    return ShownMark(**{name: getattr(mark, name) for name in names}, time=iso(mark.unix))

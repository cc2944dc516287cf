"""`GET /metrics`: the server's own registry in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from guard.metrics import CONTENT_TYPE
from service.schemas_errors import ERRORS
from service.services import Services

__all__ = ["router"]

router = APIRouter()


@router.get(
    "/metrics",
    summary="Every series, for Prometheus",
    response_class=Response,
    responses={
        **{status: ERRORS[status] for status in (401, 403, 429, 500)},
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Every series."},
    },
    tags=["operations"],
)
async def get_metrics(request: Request) -> Response:
    """Return every series."""
    return Response(await Services.of(request).peers.page(), headers={"Content-Type": CONTENT_TYPE})

"""`GET /metrics`: the server's own registry in Prometheus' text format."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from guard.metrics import CONTENT_TYPE
from service.runner import Services

__all__ = ["router"]

router = APIRouter()


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Return every series."""
    return Response(Services.of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})

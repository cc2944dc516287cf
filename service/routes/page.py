"""`GET /` and `GET /ui/{path}`: the web page, which is a handful of files and holds no data."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from service.page_files import PAGE_FOLDER, page_files

__all__ = ["CONTENT_SECURITY_POLICY", "make_router"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The page runs its own files alone, and speaks to its own server alone."""


def make_router(folder: Path = PAGE_FOLDER) -> APIRouter:
    """The page's routes. The files of `folder` are listed and read here, once."""
    files = page_files(folder)
    router = APIRouter()

    async def get_page(request: Request) -> Response:
        """One file of the page. What is not in the list does not exist, however its path is written."""
        inside = request.path_params.get("path")
        file = files.get("/" if inside is None else f"/ui/{inside}")
        if file is None:
            raise HTTPException(404)
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return Response(file.content, media_type=file.media_type, headers=headers)

    for path in ("/", "/ui/{path:path}"):
        # They are no part of the API, and its description leaves them out.
        router.add_api_route(path, get_page, methods=["GET", "HEAD"], include_in_schema=False)
    return router

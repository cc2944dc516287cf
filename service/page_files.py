"""The files of the web page: what lies in `service/ui`, under the paths at which it is served.

They are listed, and read, once: a request can only ask for a path in the list, so no other file can be reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGE_FOLDER", "PageFile", "page_files", "page_paths"]

PAGE_FOLDER = Path(__file__).parent / "ui"
INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""What a page is made of; a file of another kind is not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """One file, ready to be sent."""

    content: bytes
    media_type: str


def page_files(folder: Path = PAGE_FOLDER) -> Mapping[str, PageFile]:
    """The page's files by the paths at which they are served: `/` is index.html, all others lie below `/ui/`."""
    return {
        path: PageFile(content=file.read_bytes(), media_type=_TYPES[file.suffix])
        for path, file in _listed(folder).items()
    }


def page_paths(folder: Path = PAGE_FOLDER) -> frozenset[str]:
    """The paths of `page_files`."""
    return frozenset(_listed(folder))


def _listed(folder: Path) -> dict[str, Path]:
    """Regular files of known kinds. Links and hidden files are left out: they may lead, or belong, elsewhere."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        links = any((folder / parent).is_symlink() for parent in (inside, *inside.parents))
        if hidden or links or not file.is_file() or file.suffix not in _TYPES:
            continue
        found[f"/ui/{inside.as_posix()}"] = file
        if inside == Path(INDEX):
            found["/"] = file
    return found

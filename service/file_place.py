"""Whether a file that is kept open is still the one that its name leads to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["FilePlace"]


class FilePlace:
    """Where a file lies now; somebody may move, remove or replace it while it is written.

    error: makes what is raised of the path and the problem. Raises OSError if there is no such file.
    """

    def __init__(self, path: Path, error: Callable[[Path, str], Exception]) -> None:
        self._path = path
        self._error = error
        self._found = _identity(path)

    def check(self) -> None:
        """Refuse to write where nobody would find it. Raises what `error` makes."""
        try:
            if _identity(self._path) == self._found:
                return
        except OSError:
            pass
        raise self._error(
            self._path, "it was moved, removed or replaced while it was in use: put it back or restart the server"
        )


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino

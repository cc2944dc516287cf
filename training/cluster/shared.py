"""A folder that every machine of the cluster sees: the sign that it is one, and waiting for what another one wrote."""

from __future__ import annotations

import os
import time
from pathlib import Path

from feature_bank.errors import DataError

VISIBLE_SECONDS = 90.0
"""A network file system may remember for so long that a file was not there."""
NOT_SHARED = "the folder must lie on storage that every machine of the cluster sees under the same path"


def check_shared(path: Path) -> None:
    """Raise DataError, on the machine that does not see it, if `path` is missing: the driver wrote it before."""
    if not _appears(path, VISIBLE_SECONDS):
        raise DataError(f"{path} is not seen on machine {os.uname().nodename}; {NOT_SHARED}")


def await_file(path: Path, seconds: float = VISIBLE_SECONDS) -> None:
    """Wait until a file that a worker wrote is seen here. Raises DataError if it never is."""
    if not _appears(path, seconds):
        raise DataError(f"{path}: a worker wrote it, but it is not seen here; {NOT_SHARED}")


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline or not path.parent.is_dir():
            return False
        os.listdir(path.parent)  # asks the file system anew
        time.sleep(0.2)
    return True

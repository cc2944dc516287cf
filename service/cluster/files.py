"""Files that replicas cannot share: each takes a number, and writes a file of its own."""

from __future__ import annotations

import fcntl
import os
from itertools import count
from pathlib import Path

from service.errors import SettingsError

__all__ = ["NumberedFile"]


class NumberedFile:
    """`NAME.N.SUFFIX` in place of `NAME.SUFFIX`, where N is the lowest number that no other process on this file system
    holds. The number is held until the process ends; whoever takes it next goes on with the file.

    Raises SettingsError if the folder cannot be written.
    """

    def __init__(self, setting: str, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for number in count():
                self.path = path.with_name(f"{path.stem}.{number}{path.suffix}")
                self._descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(self._descriptor)
                else:
                    return
        except OSError as error:
            raise SettingsError(f"setting {setting!r}: {str(path)!r} cannot be used: {error.strerror}") from error

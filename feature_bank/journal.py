"""Append-only files of JSON objects, one a line, that several processes may write.

Each append holds a lock on the file, writes its lines at once and syncs them. A writer that dies in the middle leaves a
torn line at the end. Nothing is ever taken out of the file: the next append marks the torn line as such and goes on
behind it, and readers step over it and report it. A line that is malformed for any other reason is refused by number.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bank.errors import BankError

_TORN = " <- torn"  # at the end of a line: no JSON object ends so, and as long as it is not all there, no newline is


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a journal, and the line it stands on, counted from 1."""

    line: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Content:
    """What a journal holds."""

    entries: tuple[Entry, ...] = ()
    torn: tuple[int, ...] = ()
    """Lines that a writer did not get to the end of."""


class Journal:
    """A journal whose lock is held; see `hold`."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path

    def raw(self) -> bytes:
        """The whole file."""
        size = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, 0) if size else b""

    def read(self) -> Content:
        """The file's objects. Raises BankError, naming the line, for one that is malformed."""
        return _parse(self.raw(), self._path)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records behind all others, and sync them. On an error the file is as it was before."""
        lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
        if not lines:
            return
        before = self.raw()
        if before and not before.endswith(b"\n"):
            tail = before[before.rfind(b"\n") + 1 :]
            # no beginning of an object is an object, so a last line that is one lacks its newline alone
            lines = ["" if _object(tail) is not None else _TORN, *lines]
        left = memoryview(("\n".join(lines) + "\n").encode())
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except BaseException:
            os.ftruncate(self._descriptor, len(before))  # nobody else writes while the lock is held
            raise


@contextmanager
def hold(path: Path) -> Iterator[Journal]:
    """Open a journal, or begin one, and hold its lock. Not reentrant: a second `hold` or `read` of it would wait."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # While this waited, the folder may have been replaced, or a link on the way here set to another one.
            if _is_same(descriptor, path):
                _sync_folder(path.parent)
                yield Journal(descriptor, path)
                return
        finally:
            os.close(descriptor)


def read(path: Path) -> Content:
    """The objects of a journal; none if there is no such file. Waits for a writer that is in the middle of it.

    Raises BankError, naming the line, for one that is malformed.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH)
            raw = file.read()
    except FileNotFoundError:
        return Content()
    return _parse(raw, path)


def _parse(raw: bytes, path: Path) -> Content:
    entries: list[Entry] = []
    torn: list[int] = []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        data = _object(line)
        if data is not None:
            entries.append(Entry(number, data))
        elif number == len(lines) or line.endswith(_TORN.encode()):
            torn.append(number)
        else:
            raise BankError(
                "is not a JSON object; the file was altered or damaged, repair the line or put the file back",
                file=f"{path.name}:{number}",
            )
    return Content(tuple(entries), tuple(torn))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return data if isinstance(data, dict) else None


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

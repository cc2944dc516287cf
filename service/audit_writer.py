"""The thread that writes the audit: whatever waits is committed in one transaction, and old entries are removed."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

from service.audit_store import AuditError, Row, audit_error, insert, open_for_writing, prune_batch
from service.file_place import FilePlace

__all__ = ["Writer"]

_MAX_ROWS = 1024
"""Rows of one transaction; a single write may bring more."""
_MAX_WAITING_ROWS = 8192
_MAX_WAITING_CHARACTERS = 64 * 1024 * 1024
_PRUNE_SECONDS = 3600.0
_DAY = 86400.0
_CLOSE_SECONDS = 15.0
_BROKEN = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN})
"""After these the next write starts with a connection of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Write:
    """Rows that are written together, and who waits for them."""

    rows: Sequence[Row]
    characters: int
    done: Future[None] = field(default_factory=Future)

    def finish(self, error: Exception | None = None) -> None:
        # Its waiter may have been cancelled.
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class Writer:
    """Writes rows to the file at `path` on a thread of its own.

    `on_written` is told how many rows a commit has brought, `on_trouble` what went wrong while old entries were
    removed; both are called on that thread. Entries older than `days` are removed at the start and then each hour.
    """

    def __init__(
        self,
        path: Path,
        *,
        days: int,
        on_written: Callable[[int], None],
        on_trouble: Callable[[Exception], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path.absolute()
        self._days = days
        self._on_written = on_written
        self._on_trouble = on_trouble
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[_Write] = deque()
        self._rows = 0
        self._characters = 0
        self._closing = False
        self._prune_at = time.monotonic()
        self._connection: sqlite3.Connection | None = open_for_writing(self._path)
        self._place = FilePlace(self._path, audit_error)
        self._thread = threading.Thread(target=self._run, name="sailguard-audit", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> Future[None]:
        """Queue `rows`; the future ends when they are on the disk, or with an `AuditError`.

        Raises `AuditError` if too much waits already, or after `close`.
        """
        characters = sum(len(value) for row in rows for value in row if isinstance(value, str))
        write = _Write(rows=rows, characters=characters)
        with self._changed:
            if self._closing:
                raise audit_error(self._path, "it is closed")
            if self._waiting and (
                self._rows + len(rows) > _MAX_WAITING_ROWS or self._characters + characters > _MAX_WAITING_CHARACTERS
            ):
                raise audit_error(self._path, f"the disk is too slow, {self._rows} entries wait for it")
            self._waiting.append(write)
            self._rows += len(rows)
            self._characters += characters
            self._changed.notify()
        return write.done

    def close(self) -> None:
        """Write what waits, and end the thread. A disk that stalls is not waited for without end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while True:
                batch = self._next()
                if batch is None:
                    return
                if batch:
                    self._commit(batch)
                self._prune_some()
        finally:
            self._disconnect()
            with self._changed:
                self._closing = True
                left, self._waiting = self._waiting, deque()
            for write in left:  # none, unless the thread ends by an error
                write.finish(audit_error(self._path, "its writer has ended"))

    def _next(self) -> list[_Write] | None:
        """Wait for something to do. Nothing to write means that entries are to be removed, None that it is over."""
        with self._changed:
            while not self._waiting and not self._closing:
                rest = self._prune_at - time.monotonic() if self._days else None
                if rest is not None and rest <= 0:
                    break
                self._changed.wait(rest)
            if not self._waiting:
                return None if self._closing else []
            batch: list[_Write] = []
            rows = 0
            while self._waiting and (not batch or rows + len(self._waiting[0].rows) <= _MAX_ROWS):
                write = self._waiting.popleft()
                batch.append(write)
                rows += len(write.rows)
                self._rows -= len(write.rows)
                self._characters -= write.characters
            return batch

    def _commit(self, batch: Sequence[_Write]) -> None:
        rows = [row for write in batch for row in write.rows]
        try:
            self._place.check()
            insert(self._connect(), rows)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it, and the thread lives on
            self._after(error)
            if len(batch) > 1 and not isinstance(error, (AuditError, sqlite3.OperationalError)):
                for write in batch:  # One of them is at fault, and the others shall not suffer for it.
                    self._commit([write])
                return
            failure = audit_error(self._path, f"{error}")
            for write in batch:
                write.finish(error if isinstance(error, AuditError) else failure)
        else:
            try:
                self._on_written(len(rows))
            finally:
                for write in batch:
                    write.finish()

    def _prune_some(self) -> None:
        """Remove a few old entries if it is time to; while some are left, it stays time to."""
        if not self._days or time.monotonic() < self._prune_at:
            return
        try:
            self._place.check()
            if prune_batch(self._connect(), self._clock() - self._days * _DAY):
                return
        except Exception as error:  # noqa: BLE001 - it is reported, and tried again in an hour
            self._after(error)
            self._on_trouble(error)
        self._prune_at = time.monotonic() + _PRUNE_SECONDS

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = open_for_writing(self._path)
        return self._connection

    def _after(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0)
        if (code & 0xFF) in _BROKEN or (self._connection is not None and self._connection.in_transaction):
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

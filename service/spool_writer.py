"""The thread that writes the spool: what waits is packed and committed together, and what is old is removed.

Nobody waits for it. What comes while too much waits, or cannot be written, is dropped and counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from feature_bank.spool import Acts, Spool, SpoolItem, spool_error
from feature_bank.spool_retention import remove_beyond, remove_older
from service.failures import FailureLog
from service.file_place import FilePlace
from service.spool_drift import Drift, DriftMetrics

if TYPE_CHECKING:
    from service.spool import Kept

__all__ = ["SpoolMetrics", "SpoolWriter"]

_MAX_WAITING = 1024
_MAX_WAITING_BYTES = 64 * 1024 * 1024
_UNREAD_BYTES = 128 * 1024  # of an answer whose activations were collected sparsely: a generous guess
_BATCH = 64
_OLD_SECONDS = 600.0
_SIZE_SECONDS = 5.0
_SHOW_SECONDS = 5.0
_CLOSE_SECONDS = 15.0
_DAY = 86400.0


class SpoolMetrics(DriftMetrics, Protocol):
    """What the spool counts; `guard.metrics.Metrics` does it."""

    def count_spool_item(self, why: str) -> None:
        """Count an item that was written."""

    def count_spool_drop(self, reason: Literal["full", "error"]) -> None:
        """Count one that was dropped."""


class SpoolWriter:
    """Writes items to the file at `path` on a thread of its own.

    Items older than `days` are removed, and the oldest ones that nobody has marked while the file holds more than
    `most` bytes; 0 removes nothing. `logger` is a structlog logger. Raises SpoolError if the file cannot be opened, or
    holds texts that would stay for ever, `days` being 0.
    """

    def __init__(
        self,
        path: Path,
        *,
        text: bool,
        days: int,
        most: int,
        metrics: SpoolMetrics,
        logger: Any = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path.absolute()
        self._text = text
        self._days = days
        self._most = most
        self._metrics = metrics
        self._clock = clock
        self._drift = Drift(metrics)
        self._failures = FailureLog(logger, "spool not written")
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Kept, int]] = deque()
        self._bytes = 0
        self._closing = False
        self._old_at = self._size_at = self._show_at = time.monotonic()
        self._spool: Spool | None = _opened(self._path, days)
        self._place = FilePlace(self._path, spool_error)
        self._thread = threading.Thread(target=self._run, name="sailguard-spool", daemon=True)
        self._thread.start()

    def submit(self, kept: Kept) -> None:
        """Queue an item, or drop it if too much waits."""
        size = kept.seen.acts.nbytes if isinstance(kept.seen, Acts) else _UNREAD_BYTES
        with self._changed:
            full = len(self._waiting) >= _MAX_WAITING or self._bytes + size > _MAX_WAITING_BYTES
            if not self._closing and not full:
                self._waiting.append((kept, size))
                self._bytes += size
                self._changed.notify()
                return
        self._metrics.count_spool_drop("full")

    def close(self) -> None:
        """Write what waits, and end the thread. A disk that stalls is not waited for without end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                if batch:
                    self._write(batch)
                self._remove_some()
                if time.monotonic() >= self._show_at:
                    self._show_at = time.monotonic() + _SHOW_SECONDS
                    self._drift.show()
        finally:
            self._disconnect()
            with self._changed:
                self._closing = True
                left, self._waiting = len(self._waiting), deque()
            for _ in range(left):  # none, unless the thread ends by an error
                self._metrics.count_spool_drop("error")

    def _next(self) -> list[Kept] | None:
        """Wait for something to do. Nothing to write means that something is to be removed, None that it is over."""
        with self._changed:
            while not self._waiting and not self._closing:
                rest = self._old_at - time.monotonic()
                if rest <= 0:
                    return []
                self._changed.wait(rest)
            if not self._waiting:
                return None
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH))]
            self._bytes -= sum(size for _, size in batch)
            return [kept for kept, _ in batch]

    def _write(self, batch: Sequence[Kept]) -> None:
        items = [item for kept in batch if (item := self._packed(kept)) is not None]
        if not items:
            return
        try:
            self._connect().add(items)
        except Exception as error:  # noqa: BLE001 - it is counted and logged, and the thread lives on
            self._trouble(error, len(items))
            self._disconnect()
            return
        self._failures.over()
        for item in items:
            self._metrics.count_spool_item(item.why)

    def _packed(self, kept: Kept) -> SpoolItem | None:
        try:
            acts = kept.acts()
            if acts is None or not len(acts.segments):
                return None  # nothing of it was judged
            item = kept.item(acts, text=self._text)
            if kept.sampled:
                self._drift.add(kept.bank, kept.policy, kept.flagged, acts.acts)
        except Exception as error:  # noqa: BLE001 - one item's fault is not the others'
            self._trouble(error, 1)
            return None
        return item

    def _remove_some(self) -> None:
        """Remove a few items if it is time to; while some are left, it stays time to."""
        now = time.monotonic()
        try:
            if self._days and now >= self._old_at and remove_older(self._connect(), self._clock() - self._days * _DAY):
                return
            if now >= self._old_at:
                self._old_at = now + _OLD_SECONDS
            if self._most and now >= self._size_at:
                while remove_beyond(self._connect(), self._most) and not self._waiting:
                    pass
                self._size_at = now + _SIZE_SECONDS
        except Exception as error:  # noqa: BLE001 - it is logged, and tried again
            self._old_at, self._size_at = now + _OLD_SECONDS, now + _SIZE_SECONDS
            self._trouble(error, 0)
            self._disconnect()

    def _trouble(self, error: Exception, items: int) -> None:
        for _ in range(items):
            self._metrics.count_spool_drop("error")
        self._failures.add(error)

    def _connect(self) -> Spool:
        """The file, open. Raises SpoolError if it is not where it was.

        One made anew in its place would leave a log there, which damages the old one once that is put back.
        """
        self._place.check()
        if self._spool is None:
            self._spool = Spool.open_for_writing(self._path)
        return self._spool

    def _disconnect(self) -> None:
        if self._spool is not None:
            with contextlib.suppress(Exception):
                self._spool.close()
            self._spool = None


def _opened(path: Path, days: int) -> Spool:
    spool = Spool.open_for_writing(path)
    try:
        if not days and spool.holds_texts():
            raise spool_error(
                path,
                "it holds texts from before, which are kept for a limited time only: set SAILGUARD_SPOOL_DAYS to 1 or "
                "more, or remove them with `sailguard spool prune --days 1 --file FILE` once they are older than a day",
            )
    except BaseException:
        spool.close()
        raise
    return spool

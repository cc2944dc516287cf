"""The audit's file: one SQLite table of verdicts, its schema, and what is written to, read from and removed of it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bank import sqlite
from feature_bank.errors import SailguardError
from feature_bank.sqlite import iso, transaction

__all__ = [
    "COLUMNS",
    "SCHEMA_VERSION",
    "AuditError",
    "Entry",
    "Row",
    "Selection",
    "audit_error",
    "entry_of",
    "insert",
    "iso",
    "open_for_reading",
    "open_for_writing",
    "prune",
    "prune_batch",
    "read",
    "statistics",
]

Row = tuple[str | float | int | None, ...]
"""One entry, in the order of `COLUMNS`."""
Entry = dict[str, Any]
"""One entry as it was read: its id and its columns by their names."""

COLUMNS = (
    "time",
    "unix",
    "request_id",
    "key_id",
    "endpoint",
    "phase",
    "choice",
    "action",
    "domain",
    "rule",
    "score",
    "threshold",
    "token_index",
    "features",
    "model",
    "bank",
    "policy",
    "text",
)
_STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            time TEXT NOT NULL,
            unix REAL NOT NULL,
            request_id TEXT NOT NULL,
            key_id TEXT,
            endpoint TEXT NOT NULL,
            phase TEXT NOT NULL,
            choice INTEGER NOT NULL,
            action TEXT NOT NULL,
            domain TEXT NOT NULL,
            rule TEXT NOT NULL,
            score REAL,
            threshold REAL,
            token_index INTEGER NOT NULL,
            features TEXT NOT NULL,
            model TEXT NOT NULL,
            bank TEXT NOT NULL,
            policy TEXT NOT NULL,
            text TEXT
        )""",
        "CREATE INDEX verdicts_by_time ON verdicts (unix)",
    ),
)
"""What makes a file of version n + 1 out of one of version n; the first step starts from nothing."""

SCHEMA_VERSION = len(_STEPS)
_APPLICATION_ID = 0x53474155
_BATCH = 500
_INSERT = f"INSERT INTO verdicts ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


class AuditError(SailguardError):
    """The audit's file is missing, foreign, damaged or of an unknown schema, or an entry could not be written."""


def audit_error(path: Path, problem: str) -> AuditError:
    """An `AuditError` that names the file."""
    return AuditError(f"audit file {str(path)!r}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which entries are meant: from `since` on and before `until` (unix time), of one action, domain or request."""

    since: float | None = None
    until: float | None = None
    action: str | None = None
    domain: str | None = None
    request_id: str | None = None

    def where(self) -> tuple[str, list[str | float]]:
        """The SQL condition with its values."""
        conditions = {
            "unix >= ?": self.since,
            "unix < ?": self.until,
            "action = ?": self.action,
            "domain = ?": self.domain,
            "request_id = ?": self.request_id,
        }
        given = {text: value for text, value in conditions.items() if value is not None}
        return " AND ".join(["1", *given]), list(given.values())


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the file at `path`, made with its folder if it is not there, and brought to this schema if it is older.

    Raises `AuditError` for a file that is not an audit's, or is a newer program's; such a file is left as it is.
    """
    return sqlite.open_for_writing(path, _kind())


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open the file at `path`, which a server may be writing. Raises `AuditError` as `open_for_writing` does."""
    return sqlite.open_for_reading(path, _kind())


def insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write `rows` in one transaction: all of them are on the disk, or none and an `sqlite3.Error` is raised."""
    with transaction(connection):
        connection.executemany(_INSERT, rows)


def prune_batch(connection: sqlite3.Connection, before: float) -> int:
    """Remove the oldest few entries from before `before` (unix time); return how many."""
    oldest = "SELECT id FROM verdicts WHERE unix < ? ORDER BY unix LIMIT ?"
    if not connection.execute(oldest, (before, 1)).fetchone():
        return 0  # without the lock that other writers may want
    with transaction(connection):
        return connection.execute(f"DELETE FROM verdicts WHERE id IN ({oldest})", (before, _BATCH)).rowcount


def prune(path: Path, before: float) -> int:
    """Remove all entries from before `before` a few at a time, so that a server goes on writing; return how many."""
    if not path.exists():
        raise audit_error(path, "it does not exist")
    removed = 0
    with _kind().named(path), contextlib.closing(open_for_writing(path)) as connection:
        while count := prune_batch(connection, before):
            removed += count
            connection.executescript(f"PRAGMA incremental_vacuum({_BATCH})")  # `execute` would free one page
            time.sleep(0.005)  # Whoever waits for the lock polls for it.
    return removed


def read(connection: sqlite3.Connection, selection: Selection) -> Iterator[list[Entry]]:
    """Yield the entries that were there at the call, oldest first, some at a time.

    Each batch is a transaction of its own: one that lasted would keep the write-ahead log from being emptied.
    """
    condition, values = selection.where()
    query = f"SELECT id, {', '.join(COLUMNS)} FROM verdicts WHERE id > ? AND id <= ? AND {condition} ORDER BY id"
    last = int(connection.execute("SELECT coalesce(max(id), 0) FROM verdicts").fetchone()[0])
    seen = 0
    while True:
        rows = connection.execute(f"{query} LIMIT {_BATCH}", (seen, last, *values)).fetchall()
        if not rows:
            return
        seen = rows[-1][0]
        yield [entry_of(row) for row in rows]


def statistics(connection: sqlite3.Connection) -> dict[str, Any]:
    """Count the entries: in all, by what they say and by the versions that said it."""
    total, texts, first, last = connection.execute(
        "SELECT count(*), count(text), min(unix), max(unix) FROM verdicts"
    ).fetchone()
    counts: dict[str, dict[str, int]] = {}
    for column in ("action", "domain", "phase", "endpoint", "rule", "model", "bank", "policy"):
        found = connection.execute(f"SELECT {column}, count(*) FROM verdicts GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100")
        counts[column] = dict(found.fetchall())
    return {
        "entries": total,
        "with_text": texts,
        "first": first and iso(first),
        "last": last and iso(last),
        "by": counts,
    }


def entry_of(row: tuple[Any, ...]) -> Entry:
    """A row of the id and `COLUMNS` as an entry."""
    entry = dict(zip(("id", *COLUMNS), row, strict=True))
    entry["features"] = json.loads(entry["features"])
    return entry


def _kind() -> sqlite.DatabaseKind:
    return sqlite.DatabaseKind(
        name="audit file",
        application_id=_APPLICATION_ID,
        steps=_STEPS,
        probe=f"SELECT {', '.join(COLUMNS)} FROM verdicts LIMIT 0",
        maker="`sailguard serve` makes it, see SAILGUARD_AUDIT",
        error=AuditError,
    )

"""The audit's file: one SQLite table of verdicts, its schema, and what is written to, read from and removed of it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feature_bank.errors import SailguardError

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
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_APPLICATION_ID = 0x53474155
_BUSY_SECONDS = 3.0
_MAKING_SECONDS = 1.0
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


def iso(unix: float) -> str:
    """A unix time as UTC in ISO 8601 with milliseconds."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the file at `path`, made with its folder if it is not there, and brought to this schema if it is older.

    The connection is in autocommit mode; what it commits is on the disk when the commit returns.
    Raises `AuditError` for a file that is not an audit's, or is a newer program's; such a file is left as it is.
    """
    path = path.absolute()
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _examine(path) == 0:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # One that was there already may be open to others. SQLite gives the files beside it the same mode.
                if os.fstat(descriptor).st_size == 0:
                    os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open the file at `path`, which a server may be writing. Raises `AuditError` as `open_for_writing` does."""
    path = path.absolute()
    with _named(path):
        if not path.exists():
            raise audit_error(path, "it does not exist; `sailguard serve` makes it, see SAILGUARD_AUDIT")
        if _examine(path) == 0:
            raise audit_error(path, "it is empty, no server has opened it yet")
        address = f"{path.as_uri()}?mode=ro"
        connection = sqlite3.connect(address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            _check_version(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write `rows` in one transaction: all of them are on the disk, or none and an `sqlite3.Error` is raised."""
    with _transaction(connection):
        connection.executemany(_INSERT, rows)


def prune_batch(connection: sqlite3.Connection, before: float) -> int:
    """Remove the oldest few entries from before `before` (unix time); return how many."""
    oldest = "SELECT id FROM verdicts WHERE unix < ? ORDER BY unix LIMIT ?"
    if not connection.execute(oldest, (before, 1)).fetchone():
        return 0  # without the lock that other writers may want
    with _transaction(connection):
        return connection.execute(f"DELETE FROM verdicts WHERE id IN ({oldest})", (before, _BATCH)).rowcount


def prune(path: Path, before: float) -> int:
    """Remove all entries from before `before` a few at a time, so that a server goes on writing; return how many."""
    if not path.exists():
        raise audit_error(path, "it does not exist")
    removed = 0
    with _named(path), contextlib.closing(open_for_writing(path)) as connection:
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


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors name the file."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise audit_error(path, f"{error}; name a file that this user may write") from error


def _examine(path: Path) -> int:
    """Return the file's size, 0 if it is not there. Raises `AuditError` if it is something else than an audit.

    This reads the header by itself: SQLite may write to a file, or beside it, as soon as it opens it.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise audit_error(path, "it is not a regular file; name another one")
    if status.st_size == 0:
        return 0
    deadline = time.monotonic() + _MAKING_SECONDS
    while True:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
            raise audit_error(path, "it is not an SQLite database, and was left as it is; name another file")
        application = int.from_bytes(header[68:72], "big")
        if application == _APPLICATION_ID:
            break
        if application != 0 or time.monotonic() > deadline:
            raise audit_error(path, "it is another program's database; name another file")
        time.sleep(0.02)  # another worker may be making it at this moment
    _refuse_newer(int.from_bytes(header[60:64], "big"), path)
    return status.st_size


def _refuse_newer(version: int, path: Path) -> None:
    if version > SCHEMA_VERSION:
        raise audit_error(
            path,
            f"its schema is version {version}, and this sailguard knows versions up to "
            f"{SCHEMA_VERSION}: update sailguard, or name another file",
        )


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    _refuse_newer(version, path)
    return version


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the connection up, and write the schema if the file has none or an older one."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    if _check_version(connection, path) < SCHEMA_VERSION:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect before the first table alone
        # The header's two marks have to stand in the file itself, which a write-ahead log would put off.
        with _transaction(connection):
            for number in range(_check_version(connection, path), SCHEMA_VERSION):
                for statement in _STEPS[number]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _use_wal(connection)
    connection.execute("PRAGMA journal_size_limit = 67108864")
    connection.execute(f"SELECT {', '.join(COLUMNS)} FROM verdicts LIMIT 0")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. The switch wants the file to itself, and SQLite does not wait for that."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
        else:
            if mode == "wal":
                return
            if time.monotonic() > deadline:
                raise sqlite3.OperationalError("its file system does not carry a write-ahead log")
        time.sleep(0.01)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite rolls back by itself after some errors.
        if connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise

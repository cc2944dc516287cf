"""SQLite files that several processes write at once: opened privately, refused if foreign or newer.

Each kind of file carries an application id and a schema version in its header. The connections are in autocommit mode,
with a write-ahead log; what they commit is on the disk when the commit returns, and what they delete is overwritten.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from feature_bank.errors import SailguardError

__all__ = ["DatabaseKind", "iso", "open_for_reading", "open_for_writing", "transaction"]

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100
_BUSY_SECONDS = 3.0
_MAKING_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseKind:
    """What a kind of file is, and how its errors are worded."""

    name: str
    """As errors name it, such as `audit file`."""
    application_id: int
    steps: tuple[tuple[str, ...], ...]
    """What makes a file of version n + 1 out of one of version n; the first step starts from nothing."""
    probe: str
    """A statement that fails if a table or column is missing."""
    maker: str
    """What makes such a file, said where there is none."""
    error: type[SailguardError]
    links: bool = True
    """Whether the path may be a symbolic link."""

    @property
    def version(self) -> int:
        """The schema version that this program writes."""
        return len(self.steps)

    def problem(self, path: Path, problem: str) -> SailguardError:
        """An error that names the file."""
        return self.error(f"{self.name} {str(path)!r}: {problem}")

    @contextlib.contextmanager
    def named(self, path: Path) -> Iterator[None]:
        """Let errors name the file."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise self.problem(path, f"{error}; name a file that this user may write") from error


def iso(unix: float) -> str:
    """A unix time as UTC in ISO 8601 with milliseconds."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def open_for_writing(path: Path, kind: DatabaseKind) -> sqlite3.Connection:
    """Open the file at `path`, made with its folder if it is not there, and brought to this schema if it is older.

    Raises the kind's error for a file that is of another kind, or a newer program's; such a file is left as it is.
    """
    path = path.absolute()
    with kind.named(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _examine(path, kind) == 0:
            follow = 0 if kind.links else os.O_NOFOLLOW
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | follow, 0o600)
            try:
                # One that was there already may be open to others. SQLite gives the files beside it the same mode.
                if os.fstat(descriptor).st_size == 0:
                    os.fchmod(descriptor, 0o600)
            finally:
                os.close(descriptor)
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path, kind)
        except BaseException:
            connection.close()
            raise
    return connection


def open_for_reading(path: Path, kind: DatabaseKind) -> sqlite3.Connection:
    """Open the file at `path`, which another process may be writing. Raises what `open_for_writing` raises."""
    path = path.absolute()
    with kind.named(path):
        if not path.exists():
            raise kind.problem(path, f"it does not exist; {kind.maker}")
        if _examine(path, kind) == 0:
            raise kind.problem(path, "it is empty, no server has opened it yet")
        address = f"{path.as_uri()}?mode=ro"
        connection = sqlite3.connect(
            address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _check_version(connection, path, kind)
        except BaseException:
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of what is written within is on the disk at the end, or none of it."""
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


def _examine(path: Path, kind: DatabaseKind) -> int:
    """Return the file's size, 0 if it is not there. Raises the kind's error if it is something else.

    This reads the header by itself: SQLite may write to a file, or beside it, as soon as it opens it.
    """
    if not kind.links and path.is_symlink():
        raise kind.problem(path, "it is a symbolic link; name the file itself")
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise kind.problem(path, "it is not a regular file; name another one")
    if status.st_size == 0:
        return 0
    deadline = time.monotonic() + _MAKING_SECONDS
    while True:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
            raise kind.problem(path, "it is not an SQLite database, and was left as it is; name another file")
        application = int.from_bytes(header[68:72], "big")
        if application == kind.application_id:
            break
        if application != 0 or time.monotonic() > deadline:
            raise kind.problem(path, "it is another program's database; name another file")
        time.sleep(0.02)  # another process may be making it at this moment
    _refuse_newer(int.from_bytes(header[60:64], "big"), path, kind)
    return status.st_size


def _refuse_newer(version: int, path: Path, kind: DatabaseKind) -> None:
    if version > kind.version:
        raise kind.problem(
            path,
            f"its schema is version {version}, and this sailguard knows versions up to "
            f"{kind.version}: update sailguard, or name another file",
        )


def _check_version(connection: sqlite3.Connection, path: Path, kind: DatabaseKind) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    _refuse_newer(version, path, kind)
    return version


def _prepare(connection: sqlite3.Connection, path: Path, kind: DatabaseKind) -> None:
    """Set the connection up, and write the schema if the file has none or an older one."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    if _check_version(connection, path, kind) < kind.version:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect before the first table alone
        # The header's two marks have to stand in the file itself, which a write-ahead log would put off.
        with transaction(connection):
            for number in range(_check_version(connection, path, kind), kind.version):
                for statement in kind.steps[number]:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {kind.application_id}")
            connection.execute(f"PRAGMA user_version = {kind.version}")
    _use_wal(connection)
    connection.execute("PRAGMA journal_size_limit = 67108864")
    connection.execute(kind.probe)


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

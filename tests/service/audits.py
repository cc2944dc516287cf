"""Entries, counts and files as the tests of the audit use them."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from guard.events import FeatureHit
from service.audit import AuditEntry
from service.audit_store import Selection, open_for_reading, read

HIT = FeatureHit(id="L15/7", layer=15, explanation="a weapon", activation=1.5, contribution=2.0)


class Counts:
    """What the audit counted."""

    def __init__(self) -> None:
        self.entries = 0
        self.errors: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count_audit_entry(self) -> None:
        with self._lock:
            self.entries += 1

    def count_audit_error(self, on_error: str) -> None:
        self.errors[on_error] += 1


class Log:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(("error", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))


def entry(request_id: str = "req_1", **changes: Any) -> AuditEntry:
    """An entry about a harmless sentence."""
    given: dict[str, Any] = {
        "unix": time.time(),
        "request_id": request_id,
        "key_id": "key_1",
        "endpoint": "moderations",
        "phase": "prompt",
        "choice": 0,
        "action": "block",
        "domain": "violence",
        "rule": "violence",
        "score": 0.97,
        "threshold": 0.9,
        "token_index": 3,
        "features": (HIT,),
        "model": "tiny",
        "bank": "tiny@1",
        "policy": "p1",
    }
    return AuditEntry(**{**given, **changes})


def stored(path: Path, **selection: Any) -> list[dict[str, Any]]:
    """The entries of the file, oldest first, through a connection of their own."""
    with contextlib.closing(open_for_reading(path)) as connection:
        return [found for batch in read(connection, Selection(**selection)) for found in batch]


def is_whole(path: Path) -> bool:
    """Whether SQLite finds nothing wrong with the file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])

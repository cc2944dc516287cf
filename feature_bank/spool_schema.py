"""The tables of a spool's file, and the error that names it."""

from __future__ import annotations

from pathlib import Path

from feature_bank.errors import DataError
from feature_bank.sqlite import DatabaseKind

__all__ = ["ITEM_COLUMNS", "KIND", "MARK_COLUMNS", "SpoolError", "spool_error"]

ITEM_COLUMNS = (
    "time",
    "unix",
    "request_id",
    "endpoint",
    "choice",
    "phase",
    "streamed",
    "bank",
    "content_hash",
    "policy",
    "model",
    "action",
    "scores",
    "flagged",
    "tokens",
    "acts",
    "why",
    "text",
)
MARK_COLUMNS = ("item", "domain", "mark", "reviewer", "reason", "time")

_STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE items (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            time TEXT NOT NULL,
            unix REAL NOT NULL,
            request_id TEXT NOT NULL,
            endpoint TEXT NOT NULL,
            choice INTEGER NOT NULL,
            phase TEXT NOT NULL CHECK (phase IN ('prompt', 'response')),
            streamed INTEGER NOT NULL,
            bank TEXT NOT NULL,
            content_hash TEXT NOT NULL,
            policy TEXT NOT NULL,
            model TEXT NOT NULL,
            action TEXT NOT NULL,
            scores TEXT NOT NULL,
            flagged TEXT NOT NULL,
            tokens INTEGER NOT NULL,
            acts BLOB NOT NULL,
            why TEXT NOT NULL CHECK (why IN ('sampled', 'verdict', 'marked')),
            text TEXT
        )""",
        "CREATE INDEX items_by_time ON items (unix)",
        "CREATE INDEX items_by_request ON items (request_id)",
        """CREATE TABLE marks (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            item INTEGER NOT NULL REFERENCES items (id),
            domain TEXT NOT NULL,
            mark TEXT NOT NULL CHECK (mark IN ('false_positive', 'miss', 'correct')),
            reviewer TEXT NOT NULL,
            reason TEXT NOT NULL,
            time TEXT NOT NULL
        )""",
        "CREATE INDEX marks_by_item ON marks (item)",
    ),
)


class SpoolError(DataError):
    """The spool's file is missing, foreign, damaged or of an unknown schema, or something could not be written."""


KIND = DatabaseKind(
    name="spool file",
    application_id=0x53475350,
    steps=_STEPS,
    probe=f"SELECT {', '.join(f'items.{c}' for c in ITEM_COLUMNS)}, marks.id FROM items, marks LIMIT 0",
    maker="`sailguard serve --spool FILE` makes it, see SAILGUARD_SPOOL",
    error=SpoolError,
    links=False,
)


def spool_error(path: Path, problem: str) -> SpoolError:
    """A `SpoolError` that names the file."""
    return SpoolError(f"spool file {str(path)!r}: {problem}")

"""What the page asks of an audit: its newest entries, and how many verdicts there were a minute."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.audit_store import COLUMNS, Entry, Selection, audit_error, entry_of, open_for_reading

__all__ = ["FeatureCount", "History", "history", "latest"]

ACTIONS = ("flag", "steer", "block")
_MINUTE = 60
_FEATURES = 20
_LARGEST_ID = 2**63 - 1

_COUNTS = "SELECT domain, action, CAST((unix - ?) / 60 AS INTEGER), count(*) FROM verdicts WHERE {} GROUP BY 1, 2, 3"
# Beside max(), SQLite takes a column that is not grouped by from the row that holds the maximum.
_STRONGEST = (
    "SELECT json_extract(value, '$.id'), count(*), json_extract(value, '$.explanation'), max(verdicts.id) "
    "FROM verdicts, json_each(verdicts.features) WHERE {} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureCount:
    """A feature, in how many verdicts it was named, and the last explanation that it was given there."""

    id: str
    count: int
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The verdicts of some minutes."""

    start: int
    """When the first minute began (unix time)."""
    domains: dict[str, dict[str, list[int]]]
    """By domain and action the verdicts of each minute."""
    features: tuple[FeatureCount, ...]


def latest(path: Path, selection: Selection, *, limit: int, before: int | None = None) -> list[Entry]:
    """The newest entries that are meant, newest first. before: only those with a smaller id.

    Raises AuditError if the file cannot be read.
    """
    condition, values = selection.where()
    query = f"SELECT id, {', '.join(COLUMNS)} FROM verdicts WHERE id < ? AND {condition} ORDER BY id DESC LIMIT ?"
    with _reading(path) as connection:
        rows = connection.execute(query, (_LARGEST_ID if before is None else before, *values, limit)).fetchall()
    return [entry_of(row) for row in rows]


def history(path: Path, *, minutes: int, now: float, domains: Iterable[str]) -> History:
    """The verdicts of the last minutes, of which the present one is the last. domains: those that are always shown.

    Raises AuditError if the file cannot be read.
    """
    start = (int(now) // _MINUTE - minutes + 1) * _MINUTE
    condition, values = Selection(since=start, until=start + minutes * _MINUTE).where()
    found = {domain: _no_counts(minutes) for domain in domains}
    with _reading(path) as connection:
        for domain, action, minute, count in connection.execute(_COUNTS.format(condition), (start, *values)):
            if action in ACTIONS:
                found.setdefault(domain, _no_counts(minutes))[action][minute] = count
        named = connection.execute(_STRONGEST.format(condition), (*values, _FEATURES)).fetchall()
    features = tuple(FeatureCount(id=one, count=count, explanation=text) for one, count, text, _ in named)
    return History(start=start, domains=found, features=features)


def _no_counts(minutes: int) -> dict[str, list[int]]:
    return {action: [0] * minutes for action in ACTIONS}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_for_reading(path)) as connection:
        try:
            yield connection
        except sqlite3.Error as error:
            raise audit_error(path, f"{error}") from error

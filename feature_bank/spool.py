"""The spool: judged texts as the guard saw them, and what people said of the judgements.

A server writes items into an SQLite file, reviewers mark them, and a refit reads them. Items hold activations, scores
and versions; they hold the text itself only where the operator consented to it. Marks are only ever added: of an item
and a domain the last one counts.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from feature_bank.errors import DataError
from feature_bank.spool_acts import MAX_TOKENS, Acts, pack, unpack
from feature_bank.spool_schema import ITEM_COLUMNS, KIND, MARK_COLUMNS, SpoolError, spool_error
from feature_bank.sqlite import iso, open_for_reading, open_for_writing, transaction

__all__ = [
    "MARKS",
    "MAX_TOKENS",
    "Acts",
    "Mark",
    "MarkName",
    "Selection",
    "Spool",
    "SpoolError",
    "SpoolItem",
    "Why",
    "iso",
    "pack",
    "spool_error",
    "unpack",
]

Why = Literal["sampled", "verdict", "marked"]
MarkName = Literal["false_positive", "miss", "correct"]
MARKS: tuple[MarkName, ...] = get_args(MarkName)

_BATCH = 64
_COLUMNS = ", ".join(ITEM_COLUMNS)
_WITHOUT_ACTS = _COLUMNS.replace("acts", "NULL")
_INSERT = f"INSERT INTO items ({_COLUMNS}) VALUES ({', '.join('?' * len(ITEM_COLUMNS))})"
_INSERT_MARK = f"INSERT INTO marks ({', '.join(MARK_COLUMNS)}) VALUES ({', '.join('?' * len(MARK_COLUMNS))})"
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolItem:
    """One text, or one answer as far as it was judged."""

    unix: float
    """Seconds since 1970, UTC."""
    request_id: str
    endpoint: str
    choice: int
    """Number of the answer, or of the text, among those of the request."""
    phase: Literal["prompt", "response"]
    streamed: bool
    """Whether it was judged token by token, and not as a whole."""
    bank: str
    """Version of the bank."""
    content_hash: str
    """Content hash of the bank: the order of the features is its."""
    policy: str
    model: str
    action: str
    scores: Mapping[str, float]
    """The probability of every domain of the bank."""
    flagged: tuple[str, ...]
    """Domains on which a rule fired."""
    tokens: int
    """How many tokens `acts` holds."""
    acts: bytes | None
    """What `pack` made of them; None where they were not read."""
    why: Why
    text: str | None = None
    id: int | None = None
    """Its number in the file; None before it is there."""
    file: str = ""
    """The file that it was read from."""

    def activations(self) -> Acts:
        """The segments (T,) and activations (T, F) of its tokens.

        Raises SpoolError, naming the file and the item, if they are damaged.
        """
        if self.acts is None:
            raise SpoolError(f"item {self.id}: its activations were not read; read it with `acts=True`")
        try:
            found = unpack(self.acts)
        except DataError as error:
            raise spool_error(Path(self.file), f"item {self.id}: {error}") from error
        if len(found.segments) != self.tokens:
            raise spool_error(
                Path(self.file), f"item {self.id}: {self.tokens} tokens are announced, {len(found.segments)} are there"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What a reviewer said of an item's judgement in one domain."""

    item: int
    domain: str
    mark: MarkName
    reviewer: str
    reason: str
    unix: float

    def label(self, item: SpoolItem) -> bool:
        """Whether the item belongs to the domain."""
        if self.mark == "correct":
            return self.domain in item.flagged
        return self.mark == "miss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which items are meant: from `since` on and before `until` (unix time), and of what is given of the rest."""

    since: float | None = None
    until: float | None = None
    why: Why | None = None
    action: str | None = None
    endpoint: str | None = None
    request_id: str | None = None
    choice: int | None = None
    phase: str | None = None
    content_hash: str | None = None
    flagged: str | None = None
    """A domain on which a rule fired."""
    marked: bool | None = None

    def where(self) -> tuple[str, list[str | float]]:
        """The SQL condition with its values."""
        plain = ("why", "action", "endpoint", "request_id", "choice", "phase", "content_hash")
        conditions: dict[str, str | float | None] = {
            "unix >= ?": self.since,
            "unix < ?": self.until,
            **{f"{name} = ?": getattr(self, name) for name in plain},
            "EXISTS (SELECT 1 FROM json_each(items.flagged) WHERE value = ?)": self.flagged,
            "EXISTS (SELECT 1 FROM marks WHERE item = items.id) = ?": None if self.marked is None else int(self.marked),
        }
        given = {text: value for text, value in conditions.items() if value is not None}
        return " AND ".join(["1", *given]), list(given.values())


class Spool:
    """A spool's file, open; of one thread at a time, and of as many processes as like."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    @classmethod
    def open_for_writing(cls, path: str | Path) -> Self:
        """Open the file, made with its folder if it is not there. Raises SpoolError if it is not a spool."""
        path = Path(path).absolute()
        return cls(open_for_writing(path, KIND), path)

    @classmethod
    def open_existing(cls, path: str | Path) -> Self:
        """Open the file for writing, as who marks or removes items does. Raises SpoolError if it is not there."""
        path = Path(path).absolute()
        if not path.exists():
            raise spool_error(path, f"it does not exist; {KIND.maker}")
        return cls.open_for_writing(path)

    @classmethod
    def open_for_reading(cls, path: str | Path) -> Self:
        """Open the file, which a server may be writing. Raises SpoolError if it is not there or is not a spool."""
        path = Path(path).absolute()
        return cls(open_for_reading(path, KIND), path)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        """The connection to the file; what goes wrong in its use is a SpoolError that names the file."""
        try:
            yield self._connection
        except sqlite3.Error as error:
            raise spool_error(self.path, f"{error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, items: Iterable[SpoolItem]) -> int:
        """Write `items` in one transaction; return how many. They are on the disk then, all or none."""
        rows = [_row(item) for item in items]
        with self.connected() as connection, transaction(connection):
            self._connection.executemany(_INSERT, rows)
        return len(rows)

    def mark(self, item: int, domain: str, mark: MarkName, *, reviewer: str, reason: str = "") -> Mark:
        """Add a mark to an item. Raises SpoolError if there is no such item, domain or mark, or no reviewer."""
        if mark not in MARKS:
            raise spool_error(self.path, f"mark {mark!r} is none of {', '.join(MARKS)}")
        if not reviewer.strip():
            raise spool_error(self.path, "a mark needs its reviewer's name")
        made = Mark(item=item, domain=domain, mark=mark, reviewer=reviewer.strip(), reason=reason, unix=time.time())
        with self.connected() as connection, transaction(connection):
            row = self._connection.execute("SELECT scores FROM items WHERE id = ?", (item,)).fetchone()
            if row is None:
                raise spool_error(self.path, f"there is no item {item}; it may have been removed meanwhile")
            known = _decoded(self.path, item, "scores", row[0], dict)
            if domain not in known:
                raise spool_error(self.path, f"item {item} has no domain {domain!r}, but {', '.join(sorted(known))}")
            values = (made.item, made.domain, made.mark, made.reviewer, made.reason, iso(made.unix))
            self._connection.execute(_INSERT_MARK, values)
        return made

    def item(self, number: int) -> SpoolItem | None:
        """The item of that number, with its activations."""
        with self.connected():
            row = self._connection.execute(f"SELECT id, {_COLUMNS} FROM items WHERE id = ?", (number,)).fetchone()
        return None if row is None else self._item(row)

    def items(self, selection: Selection | None = None, *, acts: bool = True) -> Iterator[SpoolItem]:
        """Yield the items that are meant and were there at the call, oldest first; without `acts` their rest alone.

        They are read some at a time: one long transaction would keep the write-ahead log from being emptied.
        """
        condition, values = (selection or Selection()).where()
        query = f"SELECT id, {_COLUMNS if acts else _WITHOUT_ACTS} FROM items WHERE id > ? AND id <= ? AND {condition}"
        with self.connected():
            last = int(self._connection.execute("SELECT coalesce(max(id), 0) FROM items").fetchone()[0])
        seen = 0
        while True:
            with self.connected():
                rows = self._connection.execute(f"{query} ORDER BY id LIMIT {_BATCH}", (seen, last, *values)).fetchall()
            if not rows:
                return
            seen = rows[-1][0]
            yield from map(self._item, rows)

    def newest(self, selection: Selection, *, limit: int, before: int | None = None) -> list[SpoolItem]:
        """The newest items that are meant, newest first, without activations. before: only smaller numbers."""
        condition, values = selection.where()
        query = f"SELECT id, {_WITHOUT_ACTS} FROM items WHERE id < ? AND {condition} ORDER BY id DESC LIMIT ?"
        with self.connected():
            rows = self._connection.execute(query, (_LARGEST if before is None else before, *values, limit)).fetchall()
        return [self._item(row) for row in rows]

    def marks(self, item: int) -> list[Mark]:
        """All marks of an item, oldest first."""
        query = f"SELECT {', '.join(MARK_COLUMNS)} FROM marks WHERE item = ? ORDER BY id"
        with self.connected():
            rows = self._connection.execute(query, (item,)).fetchall()
        return [self._mark(row) for row in rows]

    def marked(self, selection: Selection | None = None) -> Iterator[tuple[SpoolItem, dict[str, bool]]]:
        """Yield every item that was marked with the labels of the domains in which it was, as the last marks say.

        A false positive is none of the domain, a miss is one, and what is correct is as it was flagged.
        """
        values = {name: getattr(selection, name) for name in Selection.__slots__} if selection else {}
        for item in self.items(Selection(**{**values, "marked": True})):
            assert item.id is not None
            yield item, {mark.domain: mark.label(item) for mark in self.marks(item.id)}

    def holds_texts(self) -> bool:
        """Whether the text of any item is kept."""
        with self.connected():
            found = self._connection.execute("SELECT 1 FROM items WHERE text IS NOT NULL LIMIT 1").fetchone()
        return found is not None

    def statistics(self) -> dict[str, Any]:
        """Count the items and marks: in all, by what they say and by the versions that said it."""
        with self.connected():
            total, texts, tokens, first, last = self._connection.execute(
                "SELECT count(*), count(text), coalesce(sum(tokens), 0), min(unix), max(unix) FROM items"
            ).fetchone()
            marks, marked = self._connection.execute("SELECT count(*), count(DISTINCT item) FROM marks").fetchone()
            by: dict[str, dict[str, int]] = {}
            for column in ("why", "action", "phase", "endpoint", "bank", "policy", "model"):
                query = f"SELECT {column}, count(*) FROM items GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100"
                by[column] = dict(self._connection.execute(query).fetchall())
            counting = self._connection.execute(
                "SELECT domain, mark, count(*) FROM marks WHERE id IN (SELECT max(id) FROM marks GROUP BY item, domain)"
                " GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()
        counted: dict[str, dict[str, int]] = {}
        for domain, mark, count in counting:
            counted.setdefault(domain, {})[mark] = count
        return {
            "items": total,
            "with_text": texts,
            "tokens": tokens,
            "first": first and iso(first),
            "last": last and iso(last),
            "marks": marks,
            "marked_items": marked,
            "by": by,
            "marked": counted,
        }

    def _item(self, row: Sequence[Any]) -> SpoolItem:
        values = dict(zip(("id", *ITEM_COLUMNS), row, strict=True))
        number = values["id"]
        values.pop("time")
        values["streamed"] = bool(values["streamed"])
        values["scores"] = _decoded(self.path, number, "scores", values["scores"], dict)
        values["flagged"] = tuple(_decoded(self.path, number, "flagged", values["flagged"], list))
        if values["acts"] is not None and not isinstance(values["acts"], bytes):
            raise spool_error(self.path, f"item {number}: its activations are damaged: they are no bytes")
        return SpoolItem(**values, file=str(self.path))

    def _mark(self, row: Sequence[Any]) -> Mark:
        values = dict(zip(MARK_COLUMNS, row, strict=True))
        try:
            unix = datetime.fromisoformat(values.pop("time")).timestamp()
        except ValueError:
            raise spool_error(self.path, f"item {values['item']}: the time of a mark is damaged") from None
        return Mark(**values, unix=unix)


def _row(item: SpoolItem) -> tuple[str | float | int | bytes | None, ...]:
    if item.acts is None:
        raise SpoolError("an item without its activations cannot be kept")
    values: dict[str, Any] = {name: getattr(item, name) for name in ITEM_COLUMNS if name != "time"}
    values["time"] = iso(item.unix)
    values["streamed"] = int(item.streamed)
    values["scores"] = json.dumps({name: float(score) for name, score in item.scores.items()}, separators=(",", ":"))
    values["flagged"] = json.dumps(list(item.flagged), separators=(",", ":"))
    return tuple(values[name] for name in ITEM_COLUMNS)


def _decoded(path: Path, item: int, column: str, text: Any, kind: type) -> Any:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, kind):
        raise spool_error(path, f"item {item}: its {column} are damaged")
    return found

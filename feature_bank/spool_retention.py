"""What is removed from a spool: old items, and those that its file has no room for."""

from __future__ import annotations

import time

from feature_bank.spool import Spool
from feature_bank.sqlite import transaction

__all__ = ["prune", "remove_beyond", "remove_older", "used_bytes"]

_BATCH = 64
_UNMARKED = "NOT EXISTS (SELECT 1 FROM marks WHERE marks.item = items.id)"
_OLD = "SELECT id FROM items WHERE unix < ? ORDER BY unix LIMIT ?"
_OLDEST = f"SELECT id FROM items WHERE why = ? AND {_UNMARKED} ORDER BY id LIMIT ?"


def used_bytes(spool: Spool) -> int:
    """Bytes of the file that hold something."""
    with spool.connected() as connection:
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
    return (pages - free) * size


def remove_older(spool: Spool, before: float) -> int:
    """Remove the oldest few items from before `before` (unix time), marked or not; return how many."""
    return _remove(spool, _OLD, before)


def remove_beyond(spool: Spool, most: int) -> int:
    """Remove the oldest few items if the file holds more than `most` bytes; return how many.

    Sampled items go first, then those with a verdict. Marked ones, which people have worked on, stay.
    """
    if used_bytes(spool) <= most:
        return 0
    return _remove(spool, _OLDEST, "sampled") or _remove(spool, _OLDEST, "verdict")


def prune(spool: Spool, *, before: float | None = None, most: int | None = None) -> int:
    """Remove all that is to be removed a few at a time, so that a server goes on writing; return how many items."""
    removed = 0
    while count := (0 if before is None else remove_older(spool, before)) or (
        0 if most is None else remove_beyond(spool, most)
    ):
        removed += count
        time.sleep(0.005)  # Whoever waits for the lock polls for it.
    return removed


def _remove(spool: Spool, chosen: str, value: float | str) -> int:
    with spool.connected() as connection:
        if not connection.execute(chosen, (value, 1)).fetchone():
            return 0  # without the lock that other writers may want
        with transaction(connection):
            found = connection.execute(chosen, (value, _BATCH)).fetchall()
            connection.executemany("DELETE FROM marks WHERE item = ?", found)
            connection.executemany("DELETE FROM items WHERE id = ?", found)
        connection.executescript(f"PRAGMA incremental_vacuum({_BATCH * 64})")  # `execute` would free one page
    return len(found)

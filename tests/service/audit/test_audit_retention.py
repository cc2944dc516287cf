"""What is older than the limit goes, and writing goes on."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import audit_writer
from service.audit import Audit
from service.audit_store import insert, open_for_writing, prune_batch
from tests.service.audit.conftest import DAY, until
from tests.service.audits import Log, entry, is_whole, stored


def aged(days: list[float]) -> list[Any]:
    return [entry(f"{each}", unix=time.time() - each * DAY) for each in days]


@pytest.mark.parametrize("days", [0, 3])
def test_only_entries_older_than_the_limit_are_removed_at_the_start(
    opened: Callable[..., Audit], path: Path, days: int
) -> None:
    with contextlib.closing(open_for_writing(path)) as connection:
        ages = [5.0, 3.01, 2.99, 1.0, 9.0, -2.0]
        insert(connection, [one.row(text=False) for one in aged(ages * 300)])
    opened(days=days)
    kept = [age for age in ages * 300 if not days or age < days]
    until(lambda: len(stored(path)) == len(kept))
    assert [float(row["request_id"]) for row in stored(path)] == kept
    assert is_whole(path)


def test_old_entries_go_each_hour_and_writes_go_on_between(
    opened: Callable[..., Audit], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import audit_store

    monkeypatch.setattr(audit_writer, "_PRUNE_SECONDS", 0.05)
    monkeypatch.setattr(audit_store, "_BATCH", 10)
    audit = opened(days=3)
    asyncio.run(audit.write([entry("new"), *aged([4.0] * 95)]))
    asyncio.run(audit.write([entry("newer")]))
    until(lambda: len(stored(path)) == 2)
    assert [row["request_id"] for row in stored(path)] == ["new", "newer"]


def test_trouble_in_removing_is_logged_and_does_not_stop_writing(
    opened: Callable[..., Audit], path: Path, logged: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(audit_writer, "prune_batch", fail)
    audit = opened()
    until(lambda: bool(logged.lines))
    asyncio.run(audit.write([entry()]))
    assert logged.lines[0][2]["reason"] == "database is locked"
    assert len(stored(path)) == 1


def test_what_was_removed_is_not_left_in_the_file(opened: Callable[..., Audit], path: Path) -> None:
    audit = opened(text=True)
    asyncio.run(audit.write([entry(text="the heron stands still"), entry("kept")]))
    audit.close()
    assert b"heron" in path.read_bytes()
    with contextlib.closing(open_for_writing(path)) as connection:
        assert prune_batch(connection, time.time() + 1) == 2
    assert b"heron" not in path.read_bytes()

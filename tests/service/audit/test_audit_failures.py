"""What happens when the audit cannot be written: the policy decides, and nothing written is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import audit as audit_module
from service import audit_writer
from service.audit import Audit, AuditError, NoAudit
from service.audit_store import insert
from tests.service.audit.conftest import PATIENCE, ROOT, connection_of
from tests.service.audits import Counts, Log, entry, is_whole, stored


def test_a_full_disk_is_decided_by_the_policy_counted_logged_and_recovered_from(
    opened: Callable[..., Audit], path: Path, counts: Counts, logged: Log
) -> None:
    audit = opened(text=True)
    long = "a bird in the hand " * 20_000
    assert asyncio.run(audit.record([entry("before")], "block"))
    connection_of(audit).execute("PRAGMA max_page_count = 20")
    for on_error, goes_on in (("block", False), ("flag", True), ("allow", True), ("unheard of", False)):
        assert asyncio.run(audit.record([entry("full", text=long), entry("small")], on_error)) is goes_on
    assert counts.errors == {"block": 2, "flag": 2, "allow": 2, "unheard of": 2}
    with pytest.raises(AuditError, match="full"):
        asyncio.run(audit.write([entry("full", text=long)]))
    connection_of(audit).execute("PRAGMA max_page_count = 1000000")
    assert asyncio.run(audit.record([entry("after", text=long)], "block"))
    assert [row["request_id"] for row in stored(path)] == ["before", "after"]
    assert counts.entries == 2
    assert [line[:2] for line in logged.lines] == [("error", "audit not written"), ("info", "audit written again")]
    assert "bird" not in str(logged.lines)
    assert is_whole(path)


_FULL_DISK = """
import asyncio, pathlib, resource, sys
from service.audit import Audit
from tests.service.audits import Counts, entry
counts = Counts()
audit = Audit.open(pathlib.Path(sys.argv[1]), text=True, days=1, metrics=counts)
async def main():
    assert await audit.record([entry("before")], "block")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    assert not await audit.record([entry("lost", text="bird " * 40_000)], "block")
    assert await audit.record([entry("lost", text="bird " * 40_000)], "flag")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert await audit.record([entry("after", text="bird " * 40_000)], "block")
asyncio.run(main())
audit.close()
assert counts.errors == {"block": 1, "flag": 1} and counts.entries == 2
"""


def test_a_write_that_the_system_refuses_loses_nothing_that_was_written(path: Path) -> None:
    subprocess.run([sys.executable, "-c", _FULL_DISK, str(path)], cwd=ROOT, check=True, timeout=60)
    assert [row["request_id"] for row in stored(path)] == ["before", "after"]
    assert is_whole(path)


def test_one_bad_entry_does_not_fail_the_others_of_its_transaction(opened: Callable[..., Audit], path: Path) -> None:
    audit = opened()
    bad = dataclasses.replace(entry("bad"), phase=None)  # type: ignore[arg-type]  # what the table refuses

    async def write() -> list[Any]:
        writes = [audit.write([one]) for one in (entry("a"), bad, entry("b"))]
        return await asyncio.gather(*writes, return_exceptions=True)

    first, second, third = asyncio.run(write())
    assert first is third is None
    assert isinstance(second, AuditError)
    assert [row["request_id"] for row in stored(path)] == ["a", "b"]


def test_a_disk_that_stalls_fails_writes_in_time_and_bounds_what_waits(
    opened: Callable[..., Audit], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    def stalled(connection: sqlite3.Connection, rows: Any) -> None:
        assert go.wait(PATIENCE)
        insert(connection, rows)

    monkeypatch.setattr(audit_writer, "insert", stalled)
    monkeypatch.setattr(audit_writer, "_MAX_WAITING_ROWS", 2)
    monkeypatch.setattr(audit_module, "_WRITE_SECONDS", 0.05)
    audit = opened()

    async def write() -> None:
        with pytest.raises(AuditError, match="within"):
            await audit.write([entry("held")])
        for name in ("one", "two"):
            with pytest.raises(AuditError, match="within"):
                await audit.write([entry(name)])
        with pytest.raises(AuditError, match="too slow, 2 entries wait"):
            await audit.write([entry("refused")])
        go.set()

    try:
        asyncio.run(write())
    finally:
        go.set()
    audit.close()
    assert [row["request_id"] for row in stored(path)] == ["held", "one", "two"]  # late, and once


def test_a_file_that_was_taken_away_fails_writes_until_it_is_back(
    opened: Callable[..., Audit], path: Path, counts: Counts
) -> None:
    audit = opened()
    assert asyncio.run(audit.record([entry("before")], "block"))
    path.rename(path.with_name("away.db"))
    assert not asyncio.run(audit.record([entry("lost")], "block"))
    path.touch()
    assert not asyncio.run(audit.record([entry("lost")], "block"))
    path.with_name("away.db").rename(path)
    assert asyncio.run(audit.record([entry("after")], "block"))
    assert counts.errors == {"block": 2}
    assert [row["request_id"] for row in stored(path)] == ["before", "after"]


def test_a_writer_that_died_fails_writes_at_once(opened: Callable[..., Audit], counts: Counts) -> None:
    audit = opened()
    audit._writer._on_written = lambda rows: 1 // 0
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        asyncio.run(audit.write([entry()]))
        audit._writer._thread.join(PATIENCE)
    finally:
        threading.excepthook = hook
    with pytest.raises(AuditError):
        asyncio.run(audit.write([entry()]))


def test_nothing_to_write_and_no_audit_never_fail(opened: Callable[..., Audit], counts: Counts) -> None:
    async def run() -> None:
        audit = opened()
        audit.close()
        await audit.write([])
        assert await audit.record([], "block")
        none = NoAudit()
        await none.write([entry()])
        assert await none.record([entry()], "block")
        none.close()

    asyncio.run(run())
    assert (counts.entries, counts.errors) == (0, {})

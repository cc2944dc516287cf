"""The audit: durable before it returns, each entry once, also of many writers and processes."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import audit_writer
from service.audit import Audit, AuditError
from service.audit_store import insert
from tests.service.audit.conftest import ROOT, connection_of
from tests.service.audits import Counts, entry, is_whole, stored


def test_an_entry_is_in_the_file_when_write_returns_and_nothing_of_it_is_lost(
    opened: Callable[..., Audit], path: Path, counts: Counts
) -> None:
    audit = opened()
    written = entry(text="a sentence about birds")

    async def write() -> list[dict[str, Any]]:
        await audit.write([written])
        return stored(path)

    (found,) = asyncio.run(write())
    assert found == {
        "id": 1,
        **{name: value for name, value in written.event().items() if name != "type"},
        "unix": written.unix,
        "text": None,
        "features": [{"id": "L15/7", "layer": 15, "explanation": "a weapon", "activation": 1.5, "contribution": 2.0}],
    }
    assert found["time"].endswith("Z")
    assert counts.entries == 1


def test_commits_wait_for_the_disk(opened: Callable[..., Audit]) -> None:
    connection = connection_of(opened())
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_many_writers_at_once_write_each_entry_once_and_in_few_transactions(
    opened: Callable[..., Audit], path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(connection: sqlite3.Connection, rows: Any) -> None:
        sizes.append(len(rows))
        insert(connection, rows)

    monkeypatch.setattr(audit_writer, "insert", counted)
    audit = opened()

    async def write_all() -> None:
        await asyncio.gather(*(audit.write([entry(f"req_{n}"), entry(f"req_{n}", choice=1)]) for n in range(400)))

    asyncio.run(write_all())
    found = [(row["request_id"], row["choice"]) for row in stored(path)]
    assert sorted(found) == sorted((f"req_{n}", choice) for n in range(400) for choice in (0, 1))
    assert counts.entries == sum(sizes) == 800
    assert len(sizes) < 400
    assert all(found[at][0] == found[at + 1][0] for at in range(0, 800, 2))  # a write's entries stay together


def test_closing_writes_what_waits_and_takes_no_more(opened: Callable[..., Audit], path: Path) -> None:
    audit = opened()

    async def write() -> None:
        writes = [asyncio.ensure_future(audit.write([entry(f"req_{n}")])) for n in range(50)]
        await asyncio.sleep(0)
        audit.close()
        await asyncio.gather(*writes)
        with pytest.raises(AuditError, match="closed"):
            await audit.write([entry()])

    asyncio.run(write())
    assert list(path.parent.iterdir()) == [path]  # the last one out leaves a single file
    assert len(stored(path)) == 50


def test_a_cancelled_waiter_takes_no_entry_with_it(opened: Callable[..., Audit], path: Path) -> None:
    audit = opened()

    async def write() -> None:
        task = asyncio.ensure_future(audit.write([entry("cancelled")]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await audit.write([entry("next")])

    asyncio.run(write())
    assert [row["request_id"] for row in stored(path)] == ["cancelled", "next"]


_WRITE_MANY = """
import asyncio, pathlib, sys
from service.audit import Audit
from tests.service.audits import Counts, entry
audit = Audit.open(pathlib.Path(sys.argv[1]), text=False, days=1, metrics=Counts())
print("open", flush=True)
sys.stdin.readline()
async def main():
    for start in range(0, 300, 20):
        await asyncio.gather(*(audit.write([entry(f"{sys.argv[2]}_{n}")]) for n in range(start, start + 20)))
asyncio.run(main())
audit.close()
"""


def test_processes_that_open_and_write_the_same_file_at_once_lose_nothing(path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", _WRITE_MANY, str(path), name], **pipes))
            for name in ("a", "b")
        ]
        for worker in workers:
            stack.callback(worker.kill)
            assert worker.stdout.readline() == "open\n"
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        assert [worker.wait(60) for worker in workers] == [0, 0]
    found = [row["request_id"] for row in stored(path)]
    assert sorted(found) == sorted(f"{name}_{n}" for name in "ab" for n in range(300))
    assert is_whole(path)

"""The audit: durable before it returns, each entry once, texts only where they are wanted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.events import FeatureHit, Verdict
from service import audit as audit_module
from service import audit_writer
from service.audit import Audit, AuditError, NoAudit, entries_of
from service.audit_store import SCHEMA_VERSION, insert, open_for_writing, prune_batch
from tests.service.audits import HIT, Counts, Log, entry, is_whole, stored

ROOT = Path(__file__).resolve().parents[2]
DAY = 86400.0
PATIENCE = 20.0


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def opened(path: Path, counts: Counts, log: Log) -> Iterator[Callable[..., Audit]]:
    """Opens audits in `path`; they are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*, text: bool = False, days: int = 90, file: Path = path) -> Audit:
            audit = Audit.open(file, text=text, days=days, metrics=counts, logger=log)
            stack.callback(audit.close)
            return audit

        yield make


def connection_of(audit: Audit) -> sqlite3.Connection:
    connection = audit._writer._connection
    assert connection is not None
    return connection


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


# Durable before it returns, each once


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


# What is kept


def test_texts_are_kept_only_if_that_is_wanted(opened: Callable[..., Audit], tmp_path: Path) -> None:
    for text in (False, True):
        file = tmp_path / f"{text}.db"
        audit = opened(text=text, file=file)
        asyncio.run(audit.write([entry(text="the heron stands still")]))
        audit.close()
        assert (b"heron" in file.read_bytes()) is text
        assert [row["text"] for row in stored(file)] == ["the heron stands still" if text else None]
    audit = opened(file=tmp_path / "True.db")  # switched off: nothing new, and what was kept stays
    asyncio.run(audit.write([entry(text="the heron flies off")]))
    assert [row["text"] for row in stored(tmp_path / "True.db")] == ["the heron stands still", None]


def test_texts_without_an_end_of_their_keeping_are_refused(opened: Callable[..., Audit], path: Path) -> None:
    with pytest.raises(AuditError, match="SAILGUARD_AUDIT_DAYS"):
        opened(text=True, days=0)
    assert not path.exists()


texts = st.text(st.characters(), max_size=30)  # surrogates are among them
numbers = st.floats(width=32)
integers = st.integers()
hits = st.builds(
    FeatureHit,
    id=texts,
    layer=st.integers(0, 99),
    explanation=texts,
    activation=numbers,
    contribution=numbers,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.fixed_dictionaries(
        dict.fromkeys(("request_id", "endpoint", "domain", "rule", "model", "bank", "policy"), texts)
    ),
    key_id=st.none() | texts,
    text=st.none() | texts,
    figures=st.fixed_dictionaries(
        {"score": numbers, "threshold": numbers, "token_index": integers, "choice": integers}
    ),
    features=st.lists(hits, max_size=3).map(tuple),
)
def test_any_entry_is_stored_and_comes_out_as_json(
    shared: tuple[Audit, Path], fields: Any, key_id: Any, text: Any, figures: Any, features: Any
) -> None:
    audit, file = shared
    written = entry(**fields, key_id=key_id, text=text, features=features, **figures)
    asyncio.run(audit.write([written]))
    found = stored(file)[-1]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    json.dumps(written.event(), allow_nan=False)
    assert "text" not in written.event()
    for name, value in {**fields, "key_id": key_id, "text": text}.items():
        assert found[name] == (
            None if value is None else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    assert len(found["features"]) == len(features)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Audit, Path]]:
    path = tmp_path_factory.mktemp("audit") / "audit.db"
    audit = Audit.open(path, text=True, days=1, metrics=Counts())
    yield audit, path
    audit.close()


def test_a_huge_text_and_numbers_of_numpy_are_stored(opened: Callable[..., Audit], path: Path) -> None:
    import numpy as np

    figures: dict[str, Any] = {"score": np.float32(0.5), "token_index": np.int64(7)}
    huge = "\U0001f426\0'\"\n" * 400_000
    asyncio.run(opened(text=True).write([entry(text=huge, **figures)]))
    (found,) = stored(path)
    assert (found["text"], found["score"], found["token_index"]) == (huge, 0.5, 7)


def test_there_is_one_entry_for_each_verdict_but_for_allow() -> None:
    verdicts = [
        Verdict(
            request_id="engine's",
            phase="response",
            token_index=number,
            domain="politics",
            score=0.5,
            threshold=0.4,
            action=action,
            rule="r",
            features=(HIT,),
            bank_version="b",
            policy_version="p",
        )
        for number, action in enumerate(("flag", "allow", "steer", "block"))
    ]
    named: dict[str, Any] = {"request_id": "req_9", "key_id": None, "endpoint": "chat", "model": "m", "choice": 2}
    entries = entries_of(verdicts, **named, text="t")
    assert [(e.token_index, e.action) for e in entries] == [(0, "flag"), (2, "steer"), (3, "block")]
    assert {(e.request_id, e.choice, e.bank, e.policy, e.text, e.features) for e in entries} == {
        ("req_9", 2, "b", "p", "t", (HIT,))
    }
    assert abs(entries[0].unix - time.time()) < PATIENCE


# Its file


def test_the_file_and_what_lies_beside_it_are_private_and_the_folder_is_made(
    opened: Callable[..., Audit], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "folder" / "audit.db"
    empty = tmp_path / "empty.db"
    empty.touch(mode=0o644)
    for each in (file, empty):
        asyncio.run(opened(file=each).write([entry()]))
        beside = [each, each.with_name(f"{each.name}-wal"), each.with_name(f"{each.name}-shm")]
        assert {stat.S_IMODE(name.stat().st_mode) for name in beside} == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE birds (name)")


def newer_audit(path: Path) -> None:
    with contextlib.closing(open_for_writing(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("birds of the coast\n" * 50), "not an SQLite database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "not an SQLite database"),
        (foreign_database, "another program's database"),
        (newer_audit, f"version {SCHEMA_VERSION + 1}.* up to {SCHEMA_VERSION}: update sailguard"),
    ],
)
def test_a_file_that_is_no_audit_of_this_schema_is_refused_and_left_as_it_is(
    opened: Callable[..., Audit], path: Path, make: Callable[[Path], Any], reason: str
) -> None:
    make(path)
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())
    with pytest.raises(AuditError, match=reason) as caught:
        opened()
    assert str(path) in str(caught.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before


def test_a_newer_schema_that_stands_in_the_log_alone_is_refused(opened: Callable[..., Audit], path: Path) -> None:
    with contextlib.closing(open_for_writing(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")  # not yet in the file itself
        with pytest.raises(AuditError, match="update sailguard"):
            opened()


def test_what_is_no_file_is_refused(opened: Callable[..., Audit], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for file in (tmp_path, tmp_path / "fifo", tmp_path / "file" / "audit.db"):
        with pytest.raises(AuditError, match=str(file)):
            opened(file=file)


def test_an_older_schema_is_brought_up_and_keeps_its_entries(
    opened: Callable[..., Audit], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import audit_store

    audit = opened()
    asyncio.run(audit.write([entry("old")]))
    audit.close()
    steps = (*audit_store._STEPS, ("ALTER TABLE verdicts ADD COLUMN note TEXT",))
    monkeypatch.setattr(audit_store, "_STEPS", steps)
    monkeypatch.setattr(audit_store, "SCHEMA_VERSION", 2)
    asyncio.run(opened().write([entry("new")]))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT request_id, note FROM verdicts").fetchall() == [("old", None), ("new", None)]


def test_threads_that_open_a_new_file_at_once_all_succeed(path: Path) -> None:
    errors: list[Exception] = []
    gate = threading.Barrier(4)

    def start() -> None:
        gate.wait()
        try:
            open_for_writing(path).close()
        except Exception as error:  # noqa: BLE001 - it is asserted upon
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stored(path) == []


# Failures


def test_a_full_disk_is_decided_by_the_policy_counted_logged_and_recovered_from(
    opened: Callable[..., Audit], path: Path, counts: Counts, log: Log
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
    assert [line[:2] for line in log.lines] == [("error", "audit not written"), ("info", "audit written again")]
    assert "bird" not in str(log.lines)
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


# Retention


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
    opened: Callable[..., Audit], path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(audit_writer, "prune_batch", fail)
    audit = opened()
    until(lambda: bool(log.lines))
    asyncio.run(audit.write([entry()]))
    assert log.lines[0][2]["reason"] == "database is locked"
    assert len(stored(path)) == 1


def test_what_was_removed_is_not_left_in_the_file(opened: Callable[..., Audit], path: Path) -> None:
    audit = opened(text=True)
    asyncio.run(audit.write([entry(text="the heron stands still"), entry("kept")]))
    audit.close()
    assert b"heron" in path.read_bytes()
    with contextlib.closing(open_for_writing(path)) as connection:
        assert prune_batch(connection, time.time() + 1) == 2
    assert b"heron" not in path.read_bytes()

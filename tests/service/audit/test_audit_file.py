"""What the audit keeps, texts only where they are wanted, and the file that it keeps it in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.events import FeatureHit, Verdict
from service.audit import Audit, AuditError, entries_of
from service.audit_store import SCHEMA_VERSION, open_for_writing
from tests.service.audit.conftest import PATIENCE
from tests.service.audits import HIT, Counts, entry, stored


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

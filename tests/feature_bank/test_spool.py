"""The spool's file: whole whatever happens, marks only added, the newest one counting, damage named."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_bank.spool import Selection, Spool, SpoolError, SpoolItem, pack

ROOT = Path(__file__).resolve().parents[2]
ACTS = np.random.default_rng(0).random((5, 7)).astype(np.float16).astype(np.float32)


def item(request_id: str = "req_1", **changes: Any) -> SpoolItem:
    given: dict[str, Any] = {
        "unix": 1_700_000_000.0,
        "request_id": request_id,
        "endpoint": "moderations",
        "choice": 0,
        "phase": "prompt",
        "streamed": False,
        "bank": "tiny@1+00000000",
        "content_hash": "0" * 64,
        "policy": "p@1",
        "model": "tiny",
        "action": "flag",
        "scores": {"violence": 0.9, "terror": 0.1},
        "flagged": ("violence",),
        "tokens": 5,
        "acts": pack([0, 0, 1, 1, 1], ACTS),
        "why": "sampled",
    }
    return SpoolItem(**{**given, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "spool.db"


def test_what_was_added_is_read_as_it_was(path: Path) -> None:
    given = [item("a", text="a heron"), item("b", phase="response", streamed=True, why="verdict", choice=2)]
    with Spool.open_for_writing(path) as spool:
        assert spool.add(given) == 2
    with Spool.open_for_reading(path) as spool:
        found = list(spool.items())
        for one, was in zip(found, given, strict=True):
            for name in SpoolItem.__slots__:
                if name not in ("id", "file"):
                    assert getattr(one, name) == getattr(was, name), name
        acts = found[0].activations()
        np.testing.assert_array_equal(acts.acts, ACTS)
        assert acts.segments.tolist() == [0, 0, 1, 1, 1]
        assert [one.acts for one in spool.items(acts=False)] == [None, None]
        assert spool.item(2) == found[1]
        assert spool.item(3) is None


def test_the_file_is_its_owners_alone(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add([item()])
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_selections_choose(path: Path) -> None:
    given = [item(f"r{n}", unix=1000.0 + n, why="verdict" if n % 2 else "sampled") for n in range(6)]
    given.append(item("other", flagged=(), action="allow", phase="response", choice=3, content_hash="1" * 64))
    with Spool.open_for_writing(path) as spool:
        spool.add(given)
        spool.mark(2, "violence", "correct", reviewer="ann")

        def chosen(**selection: Any) -> list[int | None]:
            return [one.id for one in spool.items(Selection(**selection))]

        assert chosen(since=1002.0, until=1004.0) == [3, 4]
        assert chosen(why="verdict") == [2, 4, 6]
        assert chosen(flagged="terror") == []
        assert chosen(flagged="violence", request_id="r3") == [4]
        assert chosen(phase="response", choice=3) == [7]
        assert chosen(content_hash="1" * 64) == [7]
        assert chosen(marked=True) == [2]
        assert chosen(marked=False, action="allow") == [7]
        assert [one.id for one in spool.newest(Selection(why="sampled"), limit=2, before=7)] == [5, 3]


def test_many_items_are_read_in_batches_as_they_were_at_the_call(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add(item(str(n)) for n in range(200))
        found = []
        for one in spool.items():
            if len(found) == 10:
                spool.add([item("late")])
            found.append(one.request_id)
    assert found == [str(n) for n in range(200)]


def test_marks_are_only_added_and_the_last_of_item_and_domain_counts(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add([item("a"), item("b"), item("c", flagged=())])
        spool.mark(1, "violence", "false_positive", reviewer="ann", reason="about a film")
        assert [labels for _, labels in spool.marked()] == [{"violence": False}]
        spool.mark(1, "violence", "correct", reviewer=" bo ")
        spool.mark(1, "terror", "miss", reviewer="bo")
        spool.mark(3, "violence", "correct", reviewer="bo")
        found = [(one.request_id, labels) for one, labels in spool.marked()]
        assert found == [("a", {"violence": True, "terror": True}), ("c", {"violence": False})]
        marks = spool.marks(1)
        assert [(mark.mark, mark.reviewer, mark.reason) for mark in marks] == [
            ("false_positive", "ann", "about a film"),
            ("correct", "bo", ""),
            ("miss", "bo", ""),
        ]
        assert abs(marks[0].unix - time.time()) < 60
        counts = spool.statistics()
        assert (counts["items"], counts["marks"], counts["marked_items"]) == (3, 4, 2)
        assert counts["marked"] == {"terror": {"miss": 1}, "violence": {"correct": 2}}
        assert counts["by"]["why"] == {"sampled": 3}


def test_marks_that_say_nothing_are_refused(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add([item()])
        for number, domain, mark, reviewer, reason in (
            (9, "violence", "miss", "ann", "no item 9"),
            (1, "weather", "miss", "ann", "no domain 'weather', but terror, violence"),
            (1, "violence", "maybe", "ann", "'maybe' is none of"),
            (1, "violence", "miss", " ", "reviewer's name"),
        ):
            with pytest.raises(SpoolError, match=reason) as caught:
                spool.mark(number, domain, mark, reviewer=reviewer)  # type: ignore[arg-type]
            assert str(path) in str(caught.value)
        assert spool.marks(1) == []


def damage(path: Path, column: str, value: Any) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE items SET {column} = ? WHERE id = 2", (value,))


@pytest.mark.parametrize(
    ("column", "value"),
    [("acts", b"\1garbage"), ("acts", b""), ("tokens", 6), ("acts", "text"), ("scores", "{"), ("flagged", "{}")],
)
def test_damage_is_refused_by_file_and_item(path: Path, column: str, value: Any) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add([item(), item(), item()])
    damage(path, column, value)
    with Spool.open_for_reading(path) as spool, pytest.raises(SpoolError, match="item 2: ") as caught:
        _ = [one.activations() for one in spool.items()]
    assert str(path) in str(caught.value)


def test_what_is_no_spool_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    foreign, newer, text = tmp_path / "foreign.db", tmp_path / "newer.db", tmp_path / "text.db"
    with contextlib.closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("PRAGMA application_id = 7")
        connection.execute("CREATE TABLE t (x)")
    Spool.open_for_writing(newer).close()
    with contextlib.closing(sqlite3.connect(newer)) as connection:
        connection.execute("PRAGMA user_version = 99")
    text.write_text("not a database")
    real, link = tmp_path / "real.db", tmp_path / "link.db"
    Spool.open_for_writing(real).close()
    link.symlink_to(real)
    for file, reason in (
        (foreign, "another program's"),
        (newer, "update sailguard"),
        (text, "not an SQLite"),
        (link, "link"),
    ):
        before = file.read_bytes()
        for opening in (Spool.open_for_writing, Spool.open_for_reading):
            with pytest.raises(SpoolError, match=reason) as caught:
                opening(file)
            assert str(file) in str(caught.value)
        assert file.read_bytes() == before
    with pytest.raises(SpoolError, match="--spool"):
        Spool.open_for_reading(tmp_path / "none.db")


def test_a_file_that_has_to_be_there_is_not_made(path: Path) -> None:
    with pytest.raises(SpoolError, match="does not exist"):
        Spool.open_existing(path)
    assert not path.parent.exists()
    Spool.open_for_writing(path).close()
    with Spool.open_existing(path) as spool:
        assert spool.add([item()]) == 1


def test_a_file_tells_whether_it_holds_texts(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        spool.add([item(), item()])
        assert not spool.holds_texts()
        spool.add([item(text=""), item()])
        assert spool.holds_texts()


def test_a_reader_cannot_write(path: Path) -> None:
    Spool.open_for_writing(path).close()
    with Spool.open_for_reading(path) as spool, pytest.raises(SpoolError, match="readonly"):
        spool.add([item()])


def test_writers_at_once_lose_nothing(path: Path) -> None:
    gate = threading.Barrier(4)
    errors: list[Exception] = []

    def write(name: str) -> None:
        gate.wait()
        try:
            with Spool.open_for_writing(path) as spool:
                for n in range(20):
                    spool.add([item(f"{name}{n}a"), item(f"{name}{n}b")])
                    spool.mark(1, "violence", "miss", reviewer=name)
        except Exception as error:  # noqa: BLE001 - it is asserted upon
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "wxyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Spool.open_for_reading(path) as spool:
        found = [one.request_id for one in spool.items()]
        assert sorted(found) == sorted(f"{w}{n}{c}" for w in "wxyz" for n in range(20) for c in "ab")
        assert len(spool.marks(1)) == 80


def test_a_writer_that_is_killed_leaves_whole_batches(path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from tests.feature_bank.test_spool import item
        from feature_bank.spool import Spool
        with Spool.open_for_writing(sys.argv[1]) as spool:
            for n in range(10**6):
                spool.add(item(f"{n}/{part}") for part in range(8))
                print(n, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            told = int(line)
            if told == 20:
                break
        os.kill(process.pid, signal.SIGKILL)
        told = max([told, *map(int, process.stdout)])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
    with Spool.open_for_reading(path) as spool:
        found = [one.request_id for one in spool.items()]
    batches = len(found) // 8
    assert found == [f"{n}/{part}" for n in range(batches) for part in range(8)]
    assert batches >= told + 1  # what was said to be there is there


def test_a_failed_batch_leaves_nothing(path: Path) -> None:
    with Spool.open_for_writing(path) as spool:
        with pytest.raises(SpoolError, match="CHECK"):
            spool.add([item("good"), item("bad", why="because")])
        assert list(spool.items()) == []
        spool.add([item("next")])
        assert [one.request_id for one in spool.items()] == ["next"]

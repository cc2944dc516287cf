"""A journal only ever grows: whatever happens while it is written, what stood there before is read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from feature_bank.errors import BankError
from feature_bank.journal import hold, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    write(path, 0)
    write(path, 1, 2)
    return path


def write(path: Path, *numbers: int) -> None:
    with hold(path) as journal:
        journal.append({"n": number} for number in numbers)


def numbers(path: Path) -> list[int]:
    return [entry.data["n"] for entry in read(path).entries]


def test_what_was_appended_is_read_back_in_order(path: Path, tmp_path: Path) -> None:
    assert numbers(path) == [0, 1, 2]
    assert [entry.line for entry in read(path).entries] == [1, 2, 3]
    assert read(tmp_path / "none").entries == ()
    write(path)
    assert numbers(path) == [0, 1, 2]


def test_a_torn_line_at_any_byte_loses_nothing_before_it(path: Path) -> None:
    whole = path.read_bytes()
    line = json.dumps({"n": 3, "text": "café 选举"}, ensure_ascii=False).encode()
    for length in range(1, len(line)):
        path.write_bytes(whole + line[:length])
        assert (numbers(path), read(path).torn) == ([0, 1, 2], (4,))
        write(path, 4)
        assert (numbers(path), read(path).torn) == ([0, 1, 2, 4], (4,))
        assert path.read_bytes().startswith(whole + line[:length])  # it is set aside, not thrown away


def test_a_marker_that_is_torn_itself_is_stepped_over(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"n"')
    before = path.read_bytes()
    write(path, 3)
    for length in range(len(before), len(path.read_bytes())):
        path.write_bytes(before + b' <- torn\n{"n":3}\n'[: length - len(before)])
        write(path, 4)
        assert numbers(path)[:3] == [0, 1, 2]
        assert numbers(path)[-1] == 4
        assert read(path).torn[0] == 4


@pytest.mark.parametrize("line", [b"{", b"3", b"[]", b"\xff", b'{"n": 1', b"[" * 100_000])
def test_a_malformed_line_in_the_middle_is_refused_by_its_number(path: Path, line: bytes) -> None:
    first, rest = path.read_bytes().split(b"\n", 1)
    for content in (first + b"\n" + line + b"\n" + rest, first + b"\n" + line + b"\n"):
        path.write_bytes(content)
        with pytest.raises(BankError, match="repair the line") as error:
            read(path)
        assert error.value.file == f"{path.name}:2"
        assert path.read_bytes() == content


def test_a_last_line_that_lacks_its_newline_alone_counts(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"n": 3}')
    assert (numbers(path), read(path).torn) == ([0, 1, 2, 3], ())
    write(path, 4)
    assert (numbers(path), read(path).torn) == ([0, 1, 2, 3, 4], ())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before, real, calls = path.read_bytes(), os.write, []

    def failing(descriptor: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise error
        return real(descriptor, data[:5])

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(type(error)):
        write(path, 3, 4)
    monkeypatch.undo()
    assert path.read_bytes() == before
    write(path, 5)
    assert numbers(path) == [0, 1, 2, 5]


def test_a_short_write_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write(path, 3, 4)
    assert numbers(path) == [0, 1, 2, 3, 4]


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys\nfrom pathlib import Path\nfrom feature_bank.journal import hold\n"
        "for n in range(int(sys.argv[2]), int(sys.argv[2]) + 50):\n"
        "    with hold(Path(sys.argv[1])) as journal: journal.append([{'n': n}])"
    )
    command = [sys.executable, "-c", code, str(path)]
    writers = [subprocess.Popen([*command, first], cwd=ROOT) for first in ("0", "1000")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = numbers(path)
    assert sorted(found) == [*range(50), *range(1000, 1050)]
    assert [n for n in found if n < 1000] == list(range(50))


def test_who_waited_while_the_file_was_replaced_writes_to_the_new_one(path: Path) -> None:
    new = path.with_name("new")
    writer = threading.Thread(target=write, args=(path, 3))
    with hold(path) as journal:
        writer.start()
        new.write_bytes(journal.raw())
        os.replace(new, path)
    writer.join(10)
    assert numbers(path) == [0, 1, 2, 3]


def test_a_reader_waits_for_a_writer_that_is_in_the_middle(path: Path) -> None:
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(numbers(path)))
    with hold(path) as journal:
        with path.open("ab") as file:
            file.write(b'{"n"')
        reader.start()
        reader.join(0.2)
        assert found == []
        with path.open("ab") as file:
            file.write(b": 3}\n")
        assert [entry.data["n"] for entry in journal.read().entries] == [0, 1, 2, 3]
    reader.join(10)
    assert found == [[0, 1, 2, 3]]

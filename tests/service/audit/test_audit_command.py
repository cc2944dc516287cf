"""`audit export`, `stats` and `prune` on the command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.audit import Audit
from service.audit_store import insert, open_for_writing
from service.cli import EXIT_ERROR, Commands
from service.commands.audit import build_app
from tests.service.audits import Counts, entry, is_whole, stored

DAY = 86400.0
MARCH = 1772323200.0  # 2026-03-01T00:00:00Z
NASTY = 'a "quoted"\nline\u2028 \x1b[31m \U0001f426 \\ \0'


def run(*args: object, env: dict[str, str] | None = None) -> Any:
    app = typer.Typer(cls=Commands)
    app.add_typer(build_app(), name="audit")
    return CliRunner().invoke(app, ["audit", *(str(arg) for arg in args)], env=env)


def refused(result: Any, *parts: str) -> None:
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.startswith("sailguard: ")
    assert len(result.stderr.splitlines()) == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An audit of four entries, a day apart, the first on the first of March."""
    path = tmp_path / "audit.db"
    entries = [
        entry("r0", unix=MARCH, action="flag", domain="politics", text=NASTY),
        entry("r1", unix=MARCH + DAY),
        entry("r2", unix=MARCH + 2 * DAY, rule=NASTY),
        entry("r3", unix=MARCH + 3 * DAY, domain="terror", score=float("nan")),
    ]
    with contextlib.closing(open_for_writing(path)) as connection:
        insert(connection, [one.row(text=True) for one in entries])
    return path


def exported(*args: object) -> list[str]:
    result = run("export", *args)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line)["request_id"] for line in result.stdout.splitlines()]


def test_an_export_is_ascii_json_lines_that_give_back_what_was_stored(path: Path) -> None:
    result = run("export", "--file", path)
    assert result.stdout.isascii()
    lines = result.stdout.split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == stored(path)
    assert json.loads(lines[0])["text"] == NASTY
    assert json.loads(lines[2])["rule"] == NASTY
    assert json.loads(lines[3])["score"] is None
    assert not any(ord(sign) < 32 or ord(sign) == 127 for line in lines for sign in line)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--since", "2026-03-02"], ["r1", "r2", "r3"]),
        (["--since", "2026-03-02T00:00:00.001Z"], ["r2", "r3"]),
        (["--since", "2026-03-02T02:00:00+02:00", "--until", "2026-03-03T00:00:00"], ["r1"]),
        (["--action", "flag"], ["r0"]),
        (["--action", "block", "--domain", "violence"], ["r1", "r2"]),
        (["--domain", "' OR 1=1 --"], []),
    ],
)
def test_an_export_holds_what_was_asked_for(path: Path, options: list[str], names: list[str]) -> None:
    assert exported("--file", path, *options) == names


def test_an_export_into_a_file_is_private_and_whole_or_not_at_all(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    result = run("export", "--file", path, "--out", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert out.read_text() == run("export", "--file", path).stdout
    assert stat.S_IMODE(out.stat().st_mode) == 0o600

    def broken(*_: Any) -> Iterator[list[dict[str, Any]]]:
        yield [{"id": 1}]
        raise OSError("the disk is gone")

    before = out.read_text()
    monkeypatch.setattr("service.audit_store.read", broken)
    refused(run("export", "--file", path, "--out", out), "the disk is gone")
    assert out.read_text() == before
    assert [found for found in tmp_path.iterdir() if found.suffix == ".tmp"] == []


def test_an_export_never_replaces_the_audit(path: Path) -> None:
    assert run("export", "--file", path, "--out", path).exit_code == EXIT_ERROR
    assert len(stored(path)) == 4


def test_the_file_may_be_named_by_the_servers_setting(path: Path) -> None:
    result = run("stats", "--json", env={"SAILGUARD_AUDIT": str(path)})
    assert json.loads(result.stdout)["entries"] == 4


def test_a_file_that_is_being_written_is_read_and_pruned_beside_it(path: Path) -> None:
    audit = Audit.open(path, text=False, days=0, metrics=Counts())
    try:
        asyncio.run(audit.write([entry("r4")]))
        assert exported("--file", path, "--since", "2026-03-04") == ["r3", "r4"]
        (kept,) = [row for row in stored(path) if row["request_id"] == "r4"]
        days = max(1, int((time.time() - MARCH) / DAY) - 5)
        removed = json.loads(run("prune", "--file", path, "--days", min(days, 1), "--json").stdout)["removed"]
        asyncio.run(audit.write([entry("r5")]))
        left = stored(path)
        assert kept in left
        assert left[-1]["request_id"] == "r5"
        assert removed == 6 - len(left)
    finally:
        audit.close()
    assert is_whole(path)


def test_stats_count_and_show_no_sign_that_a_terminal_obeys(path: Path) -> None:
    found = json.loads(run("stats", "--file", path, "--json").stdout)
    assert (found["entries"], found["with_text"]) == (4, 1)
    assert (found["first"], found["last"]) == ("2026-03-01T00:00:00.000Z", "2026-03-04T00:00:00.000Z")
    assert found["by"]["action"] == {"block": 3, "flag": 1}
    assert found["by"]["domain"] == {"violence": 2, "politics": 1, "terror": 1}
    assert found["bytes"] == path.stat().st_size
    shown = run("stats", "--file", path).stdout
    assert "4 (1 with text)" in shown
    assert "\x1b" not in shown


def test_stats_of_an_audit_without_entries_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    open_for_writing(path).close()
    assert "0 (0 with text)" in run("stats", "--file", path).stdout
    found = json.loads(run("stats", "--file", path, "--json").stdout)
    assert (found["entries"], found["first"], found["last"]) == (0, None, None)
    assert exported("--file", path) == []


def test_prune_removes_only_what_is_old_and_gives_the_room_back(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    now = time.time()
    old = [entry(f"old_{n}", unix=now - 5 * DAY, text="bird " * 200) for n in range(1200)]
    with contextlib.closing(open_for_writing(path)) as connection:
        insert(connection, [one.row(text=True) for one in [*old, entry("new", unix=now - DAY)]])
    size = path.stat().st_size
    assert run("prune", "--file", path, "--days", 3).stdout == "1200 entries removed\n"
    assert [row["request_id"] for row in stored(path)] == ["new"]
    assert path.stat().st_size < size / 4
    assert is_whole(path)
    assert run("prune", "--file", path, "--days", 0).exit_code == 2


@pytest.mark.parametrize("command", [["export"], ["stats"], ["prune", "--days", "1"]])
def test_what_is_no_audit_is_one_line_and_nothing_is_made(tmp_path: Path, command: list[str]) -> None:
    refused(run(*command, "--file", tmp_path / "gone.db"), "gone.db", "does not exist")
    text = tmp_path / "text.db"
    text.write_text("birds\n" * 100)
    refused(run(*command, "--file", text), "text.db", "not an SQLite database")
    assert sorted(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("time", ["yesterday", "2026-13-01", ""])
def test_a_time_that_is_none_is_refused_by_its_option(path: Path, time: str) -> None:
    result = run("export", "--file", path, "--since", time)
    assert result.exit_code == EXIT_ERROR
    assert "--since" in result.stderr

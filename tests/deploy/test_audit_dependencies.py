"""The audit fails for a vulnerability, says so where it cannot look, and passes one over only until a day."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import ROOT, load_script

audit = load_script("audit-dependencies")

KNOWN = {"jinja2": "PYSEC-0-1", "honey": "PYSEC-0-2"}
AUDITOR = """#!{python}
import json, sys
if "--version" in sys.argv:
    print("pip-audit {version}")
    raise SystemExit
if {broken}:
    print("ERROR: could not connect", file=sys.stderr)
    raise SystemExit(1)
known = {known}
lines = [line for line in open(sys.argv[sys.argv.index("-r") + 1]).read().split() if "==" in line]
found = []
for line in lines:
    name, version = line.split("==")
    vulns = [{{"id": known[name], "aliases": ["CVE-0-1"], "fix_versions": ["9"]}}] if name in known else []
    found.append({{"name": name, "version": version, "vulns": vulns}})
print(json.dumps({{"dependencies": found}}))
raise SystemExit(any(package["vulns"] for package in found))
"""


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "pins.txt"
    path.write_text("honey==1.0\nnectar==2.0\n")
    return path


def make_auditor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, str], *, broken: bool = False
) -> None:
    """Put a pip-audit on PATH that knows of these vulnerabilities, by package."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "pip-audit"
    program.write_text(AUDITOR.format(python=sys.executable, version=audit.VERSION, known=known, broken=broken))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def run(tmp_path: Path, pins: Path, ignored: str = "") -> int:
    (tmp_path / "ignored.txt").write_text(ignored)
    status: int = audit.main([str(pins), "--ignored", str(tmp_path / "ignored.txt")])
    return status


def test_a_vulnerability_fails_with_a_table(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    make_auditor(tmp_path, monkeypatch, KNOWN)
    assert run(tmp_path, pins) == 1
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["package", "version", "vulnerability", "fixed", "in"]
    assert row.split() == ["honey", "1.0", "PYSEC-0-2", "CVE-0-1", "9"]


def test_nothing_found_passes(tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    make_auditor(tmp_path, monkeypatch, {"jinja2": "PYSEC-0-1"})
    assert run(tmp_path, pins) == 0
    assert capsys.readouterr().out == "no known vulnerabilities in pins.txt\n"


@pytest.mark.parametrize("broken", [True, False])
def test_a_database_that_tells_nothing_is_a_skip_and_no_pass(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, broken: bool
) -> None:
    make_auditor(tmp_path, monkeypatch, {}, broken=broken)
    assert run(tmp_path, pins) == 0
    assert capsys.readouterr().out == "skipped: the vulnerability database cannot be reached\n"


@pytest.mark.parametrize("name", ["PYSEC-0-2", "CVE-0-1"])
def test_an_entry_passes_its_vulnerability_over_by_id_and_by_alias(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str
) -> None:
    make_auditor(tmp_path, monkeypatch, KNOWN)
    assert run(tmp_path, pins, f"# why\n{name} 9999-12-31 the function is never called\n") == 0
    assert "the function is never called" in capsys.readouterr().err


@pytest.mark.parametrize("known", [KNOWN, {}])
def test_an_expired_entry_fails_whether_or_not_the_database_is_reached(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, known: dict[str, str]
) -> None:
    make_auditor(tmp_path, monkeypatch, known)
    assert run(tmp_path, pins, "PYSEC-0-2 2020-01-01 the function is never called\n") == 1
    assert "decide again" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["PYSEC-0-2", "PYSEC-0-2 9999-12-31", "PYSEC-0-2 soon it is fine", "A 9999-13-01 why"])
def test_an_entry_without_a_date_or_a_reason_is_refused(
    tmp_path: Path, pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, line: str
) -> None:
    make_auditor(tmp_path, monkeypatch, KNOWN)
    assert run(tmp_path, pins, line + "\n") == 2
    assert "line 1" in capsys.readouterr().err


def test_an_auditor_of_another_version_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_auditor(tmp_path, monkeypatch, KNOWN)
    installed: list[list[str]] = []
    monkeypatch.setattr(audit, "VERSION", "0.0.1")
    monkeypatch.setattr(audit, "_run", lambda words: installed.append(list(words)))
    assert audit.find_auditor(tmp_path) == str(tmp_path / "venv/bin/pip-audit")
    assert installed[-1][-1] == "pip-audit==0.0.1"


def test_the_project_s_own_list_can_be_read_and_its_files_exist() -> None:
    audit.read_ignored(ROOT / "scripts/audit-ignore.txt")
    assert [name for name in audit.FILES if not (ROOT / name).is_file()] == []
    assert (ROOT / "scripts/audit-dependencies").stat().st_mode & stat.S_IXUSR

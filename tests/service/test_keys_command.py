"""`sailguard keys`: a key is shown once, its file is private, and what was revoked is gone in one step."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from service.auth import KeyRing, Principal, Role
from service.cli import EXIT_ERROR, Commands
from service.commands import keys
from service.key_file import KeyFile, add_key, hashed_line, new_key
from tests.service.edges import write_keys


def run(*arguments: object, env: dict[str, str] | None = None) -> Any:
    app = typer.Typer(cls=Commands)
    app.add_typer(keys.build_app(), name="keys")
    return CliRunner().invoke(app, ["keys", *map(str, arguments)], env=env)


def error_line(result: Any) -> str:
    assert result.exit_code == EXIT_ERROR, result.output
    (line,) = result.stderr.splitlines()
    return str(line)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_a_new_key_opens_and_stands_in_the_file_only_as_a_digest(file: Path) -> None:
    result = run("new", "--id", "team-a", "--file", file, "--rate", "600 / minute", "--concurrent", 8)
    assert result.exit_code == 0, result.stderr
    key = result.stdout.strip()
    assert len(key) >= 40
    assert "team-a" in result.stderr
    assert key not in result.stderr + file.read_text()
    principal = Principal(key_id="team-a", role=Role.CLIENT, rate="600/minute", concurrent=8)
    assert KeyRing(file=file).identify(key.encode()) == principal
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys"]


def test_a_further_key_leaves_the_rest_of_the_file_as_it_is(file: Path) -> None:
    write_keys(file, "# the teams", "", "plain-key")
    file.chmod(0o640)
    key = json.loads(
        run("new", "--id", "ops", "--role", "admin", "--json", env={"SAILGUARD_API_KEYS_FILE": str(file)}).stdout
    )
    assert (key["id"], key["role"], key["file"]) == ("ops", "admin", str(file))
    assert file.read_text() == f"# the teams\n\nplain-key\n{key['line']}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    ring = KeyRing(file=file)
    assert ring.has_admin
    assert ring.identify(b"plain-key")


def test_without_a_file_the_line_is_printed(file: Path) -> None:
    key, line = run("new", "--id", "team-a", env={"SAILGUARD_API_KEYS_FILE": ""}).stdout.splitlines()
    write_keys(file, line)
    found = KeyRing(file=file).identify(key.encode())
    assert found is not None
    assert found.key_id == "team-a"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--id", "team a"), "an id is"),
        (("--id", ""), "an id is"),
        (("--id", "x admin"), "an id is"),
        (("--id", "team-b", "--rate", "fast"), "600/minute"),
        (("--id", "team-a"), "already"),
    ],
)
def test_a_key_that_cannot_be_stored_is_not_made(file: Path, arguments: tuple[str, ...], part: str) -> None:
    assert run("new", "--id", "team-a", "--file", file).exit_code == 0
    before = file.read_bytes()
    result = run("new", *arguments, "--file", file)
    assert part in error_line(result)
    assert result.stdout == ""
    assert file.read_bytes() == before


@pytest.mark.parametrize("command", [("new", "--id", "x"), ("list",), ("revoke", "x")])
def test_a_file_that_is_no_keys_file_is_left_alone(file: Path, command: tuple[str, ...]) -> None:
    write_keys(file, "this is a letter")
    before = file.read_bytes()
    line = error_line(run(*command, "--file", file))
    assert "line 1" in line
    assert "letter" not in line
    write_keys(file, "fine")
    file.chmod(0o666)
    assert "chmod 600" in error_line(run(*command, "--file", file))
    write_keys(file, "this is a letter")
    assert file.read_bytes() == before


def test_a_folder_that_does_not_exist_is_one_line_of_error(tmp_path: Path) -> None:
    assert "nowhere" in error_line(run("new", "--id", "x", "--file", tmp_path / "nowhere" / "keys"))


def test_the_list_shows_ids_roles_and_limits_and_no_whole_digest(file: Path) -> None:
    made = run("new", "--id", "team-a", "--role", "reader", "--rate", "5/second", "--file", file).stdout.strip()
    with file.open("a") as lines:
        lines.write("plain-key\n")
    shown, data = run("list", "--file", file).stdout, run("list", "--file", file, "--json").stdout
    first, second = json.loads(data)
    assert (first["id"], first["role"], first["rate"], first["concurrent"]) == ("team-a", "reader", "5/second", None)
    assert (first["stored"], second["stored"], second["role"]) == ("hashed", "plain", "client")
    for key in KeyFile.read(file).keys:
        assert key.principal.key_id in shown
        assert key.digest.hex()[8:16] not in shown + data
    assert made not in shown + data
    assert "plain-key" not in shown + data


def test_a_revoked_key_is_gone_and_the_others_stay(file: Path) -> None:
    made = {name: run("new", "--id", name, "--file", file).stdout.strip() for name in ("team-a", "team-b")}
    ring = KeyRing(file=file)
    assert "1 left" in run("revoke", "team-a", "--file", file).stdout
    assert ring.refresh()
    assert ring.identify(made["team-a"].encode()) is None
    assert ring.identify(made["team-b"].encode()) is not None
    assert "team-a" in error_line(run("revoke", "team-a", "--file", file))
    assert "no key is left" in run("revoke", "team-b", "--file", file).stdout
    assert ring.refresh()
    assert len(ring) == 0
    assert "holds no key" in error_line(run("revoke", "x", "--file", file.with_name("none")))


def test_a_plain_key_is_revoked_by_its_id(file: Path) -> None:
    write_keys(file, "# one", "plain-key", "other-key")
    (row, _) = json.loads(run("list", "--file", file, "--json").stdout)
    assert run("revoke", row["id"], "--file", file).exit_code == 0
    assert file.read_text() == "# one\nother-key\n"


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file.symlink_to(tmp_path / "real" / "keys")
    assert run("new", "--id", "team-a", "--file", file).exit_code == 0
    assert file.is_symlink()
    assert len(KeyRing(file=file)) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("new", "--id", "team-a", "--file", file)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in error_line(run("new", "--id", "team-b", "--file", file))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["keys"]


def test_writers_side_by_side_lose_no_key(file: Path) -> None:
    def add(number: int) -> None:
        add_key(file, hashed_line(new_key(), Principal(key_id=f"team-{number}", role=Role.CLIENT)))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.principal.key_id for key in KeyFile.read(file).keys} == {f"team-{number}" for number in range(12)}


def test_roles_of_the_command_are_those_of_the_service() -> None:
    assert [role.value for role in keys.KeyRole] == [role.value for role in Role]

"""`spool list`, `show`, `mark`, `stats` and `prune` on the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from feature_bank.spool import Spool
from service.cli import EXIT_ERROR, Commands
from service.commands.spool import build_app
from tests.feature_bank.test_spool import item


def run(*args: object, env: dict[str, str] | None = None) -> Any:
    app = typer.Typer(cls=Commands)
    app.add_typer(build_app(), name="spool")
    return CliRunner().invoke(app, ["spool", *(str(arg) for arg in args)], env=env)


def done(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "spool.db"
    with Spool.open_for_writing(path) as spool:
        spool.add([item("old", unix=1000.0, text="a \x1b[31m line"), item("new", unix=time.time(), why="verdict")])
    return path


def test_items_are_listed_the_newest_first(path: Path) -> None:
    done("mark", 1, "violence", "correct", "--file", path, "--reviewer", "Ann")
    found = json.loads(done("list", "--file", path, "--json"))
    assert [one["id"] for one in found] == [2, 1]
    assert [mark["mark"] for mark in found[1]["marks"]] == ["correct"]
    assert [one["id"] for one in json.loads(done("list", "--file", path, "--json", "--marked"))] == [1]
    assert [one["id"] for one in json.loads(done("list", "--file", path, "--json", "--why", "verdict"))] == [2]
    assert "moderations" in done("list", "--file", path)


def test_an_item_is_shown_with_its_marks_and_strongest_features(path: Path) -> None:
    done("mark", 1, "terror", "miss", "--file", path, "--reviewer", "Ann", "--reason", "a plan")
    shown = json.loads(done("show", 1, "--file", path, "--json"))
    assert shown["marks"][0]["reason"] == "a plan"
    assert len(shown["strongest"]) == 7
    text = done("show", 1, "--file", path)
    assert "terror: miss by Ann a plan" in text
    assert "\x1b[31m" not in text


def test_a_mark_needs_its_reviewer_and_something_to_mark(path: Path) -> None:
    assert run("mark", 1, "violence", "miss", "--file", path).exit_code == EXIT_ERROR
    assert run("mark", 1, "violence", "miss", "--file", path, env={"SAILGUARD_REVIEWER": "Bo"}).exit_code == 0
    for args in ((7, "violence", "miss"), (1, "weather", "miss")):
        result = run("mark", *args, "--file", path, "--reviewer", "Ann")
        assert result.exit_code == EXIT_ERROR
        assert str(path) in result.stderr.replace("\n", "")
    nowhere = path.with_name("nowhere.db")
    assert run("mark", 1, "violence", "miss", "--file", nowhere, "--reviewer", "Ann").exit_code == EXIT_ERROR
    assert not nowhere.exists()


def test_counts_are_those_of_the_file(path: Path) -> None:
    done("mark", 2, "violence", "false_positive", "--file", path, "--reviewer", "Ann")
    found = json.loads(done("stats", "--file", path, "--json"))
    assert (found["items"], found["with_text"], found["marks"]) == (2, 1, 1)
    assert found["marked"] == {"violence": {"false_positive": 1}}
    assert "false_positive" in done("stats", "--file", path)


def test_what_is_old_is_removed(path: Path) -> None:
    assert run("prune", "--file", path).exit_code == EXIT_ERROR
    assert json.loads(done("prune", "--file", path, "--days", 2, "--json")) == {"removed": 1}
    with Spool.open_for_reading(path) as spool:
        assert [one.request_id for one in spool.items()] == ["new"]


@pytest.mark.parametrize(
    "args",
    [
        ("show", 2**63),
        ("mark", 2**63, "violence", "miss", "--reviewer", "Ann"),
        ("list", "--before", 10**30),
        ("prune", "--days", 10**400),
    ],
)
def test_a_number_that_no_file_counts_to_is_wrong_input(path: Path, args: tuple[object, ...]) -> None:
    result = run(*args, "--file", path)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == EXIT_ERROR
    assert "less than or equal to" in " ".join(result.stderr.split())


def test_the_largest_number_is_one_like_others(path: Path) -> None:
    largest = 2**63 - 1
    assert [one["id"] for one in json.loads(done("list", "--file", path, "--json", "--before", largest))] == [2, 1]
    result = run("show", largest, "--file", path)
    assert result.exit_code == EXIT_ERROR
    assert f"no item {largest}" in result.stderr
    assert json.loads(done("prune", "--file", path, "--days", largest, "--json")) == {"removed": 0}


def test_no_command_makes_a_file(path: Path) -> None:
    nowhere = path.with_name("nowhere.db")
    for args in (("list",), ("show", 1), ("stats",), ("prune", "--days", 1)):
        result = run(*args, "--file", nowhere)
        assert result.exit_code == EXIT_ERROR
        assert "does not exist" in " ".join(result.stderr.split())
    assert not nowhere.exists()

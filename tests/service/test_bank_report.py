"""`bank report`, run on small banks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import build_app

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(build_app(), ["bank", "report", *map(str, args)], env={"COLUMNS": "200"})

    return invoke


def test_it_writes_a_page_and_says_what(run: Run, write_bank: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = write_bank(tmp_path / "bank", explanation="<b>bold</b> \x1b[31m"), tmp_path / "page.html"
    result = run(folder, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 features of tiny@1+" in result.output
    page = out.read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt; ␛[31m" in page
    again = run(folder, "--out", out, "--overwrite", "--json")
    told = json.loads(again.stdout)
    assert told["report"] == str(out)
    assert told["features"] == 2
    assert told["bytes"] == out.stat().st_size
    assert out.read_text(encoding="utf-8") == page


def test_the_shipped_bank_is_the_default(run: Run, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bank"].startswith("smollm2-135m-instruct@")
    assert json.loads(result.stdout)["bytes"] <= 6_000_000


def test_a_selection_joins_the_page(run: Run, write_bank: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_bank(tmp_path / "bank")
    sae = {"name": "first", "hook_name": "blocks.1.hook_resid_post", "l0": 16.0, "i_cdf": 0.04}
    (tmp_path / "selection.json").write_text(json.dumps({"saes": [sae], "choice": {"overall": "first"}}))
    assert run(folder, "--out", tmp_path / "page.html", "--selection", tmp_path).exit_code == 0
    assert 'id="selection"' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(["{tmp}/none", "--out", "{tmp}/a.html"], "the folder is no bank", id="no bank"),
        pytest.param(["{tmp}/bank", "--out", "{tmp}/there.html"], "--overwrite", id="exists"),
        pytest.param(["{tmp}/bank", "--out", "{tmp}"], "a folder", id="out is a folder"),
        pytest.param(["{tmp}/bank", "--out", "{tmp}/there.html/a.html"], "cannot be written", id="unwritable"),
        pytest.param(["{tmp}/bank", "--out", "{tmp}/a.html", "--selection", "{tmp}"], "selection.json", id="selection"),
        pytest.param(["{tmp}/bank", "--out", "{tmp}/a.html", "--taxonomy", "{tmp}"], "no taxonomy", id="taxonomy"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    args: list[str], message: str, run: Run, write_bank: Callable[..., Path], tmp_path: Path
) -> None:
    write_bank(tmp_path / "bank")
    (tmp_path / "there.html").write_text("mine")
    result = run(*(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not (tmp_path / "a.html").exists()

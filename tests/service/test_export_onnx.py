"""`export-onnx`, run for real on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from guard.engines.onnx import OnnxEngine
from service.cli import EXIT_ERROR, build_app

Run = Callable[..., Any]


@pytest.fixture
def run(model: Path) -> Run:
    def invoke(*args: object) -> Any:
        words = ["export-onnx", *map(str, args), "--model", str(model)]
        return CliRunner().invoke(build_app(), words, env={"COLUMNS": "100"})

    return invoke


def test_an_export_is_served_as_it_is(run: Run, bank: Path, tmp_path: Path) -> None:
    result = run(bank, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "int8" in result.stdout
    assert "fp32" in result.stdout
    engine = OnnxEngine.start(tmp_path / "out", threads=1)
    assert engine.precision == "int8"
    (score,) = engine.score(["Herons stand in the shallows."], ["prompt"])
    assert score.scores["violence"] > 0.9


def test_one_precision_alone_may_be_asked_for(run: Run, bank: Path, tmp_path: Path) -> None:
    assert run(bank, tmp_path / "out", "--fp32").exit_code == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"bank", "model.onnx", "sidecar.json", "tokenizer.json"}
    assert run(bank, tmp_path / "out", "--int8").exit_code == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"bank", "model.int8.onnx", "sidecar.json", "tokenizer.json"}


def test_what_cannot_be_exported_is_told_in_one_line(run: Run, bank: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    for source, out, reason in (
        (tmp_path / "none", tmp_path / "out", "bank.json"),
        (bank, tmp_path / "mine", "was not written by export-onnx"),
    ):
        result = run(source, out)
        assert result.exit_code == EXIT_ERROR
        assert reason in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()

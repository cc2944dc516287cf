"""`train`, its bare form and its commands: `train saes` run for real on a tiny model."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from feature_bank.formats.saelens import load_saelens
from service.cli import EXIT_ERROR, EXIT_INTERRUPTED, build_app

Run = Callable[..., Any]
HOOKS = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
SWEEP: dict[str, Any] = {
    "hook_points": HOOKS,
    "max_tokens": 40,
    "batch_tokens": 64,
    "saes": [{"architecture": "batch_topk", "expansion": 2, "options": {"k": 3}, "sweep": {"k": [2, 4]}}],
}


@pytest.fixture
def run() -> Run:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(build_app(), ["train", *(str(arg) for arg in args)])

    return invoke


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for number, path in enumerate(paths):
        rows = [{"text": f"{number} river {i * i} garden {i * 7 % 13}"} for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    return path


def assert_error(result: Any, *parts: object) -> None:
    """One line on standard error, without a traceback."""
    assert result.exit_code == EXIT_ERROR, result.output
    (line,) = result.stderr.splitlines()
    for part in parts:
        assert str(part) in line


def test_without_a_command_a_bank_is_meant(run: Run) -> None:
    for args in ([], ["bank"]):
        result = run(*args)
        assert result.exit_code == 2
        assert "--out" in result.stderr
    text = run("--help").stdout
    assert all(word in text for word in ("saes", "harvest", "--preset", "--overwrite"))
    for name in ("bank", "saes", "harvest"):
        assert "Usage" in run(name, "--help").stdout


def test_one_command_goes_from_text_to_many_saes_and_a_table(
    run: Run, tmp_path: Path, model: Path, texts: list[Path], sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    # A second file may follow without an option of its own
    result = run("saes", "--config", sweep, "--data", texts[0], texts[1], "--out", out, "--model", model)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["hook", "point", "architecture", "options", "seed", "fvu", "l0", "dead", "tokens/s"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [hook, "batch_topk", "k", k, "0"] for hook in HOOKS for k in "24"
    ]
    assert "60 of 60 texts" in result.stderr
    assert "4 SAEs" in result.stderr
    with (out / "results.csv").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    for name, line in zip(names, lines[1:], strict=True):
        assert load_saelens(out / "saes" / name).hook_name == line.split()[0]

    again = run("saes", "--config", sweep, "--data", *texts, "--out", out, "--model", model, "--json")
    assert json.loads(again.stdout) == json.loads((out / "results.json").read_text())
    assert [f"{row['fvu']:.4f}" for row in json.loads(again.stdout)] == [line.split()[5] for line in lines[1:]]


def test_harvested_activations_need_neither_text_nor_model(
    run: Run, tmp_path: Path, model: Path, texts: list[Path], sweep: Path
) -> None:
    points = [part for hook in HOOKS for part in ("--hook-point", hook)]
    made = run("harvest", "--data", texts[0], *points, "--out", tmp_path / "cache", "--model", model)
    assert made.exit_code == 0, made.output
    result = run("saes", "--config", sweep, "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)) == 4


def test_ctrl_c_leaves_checkpoints_from_which_the_same_command_goes_on(
    run: Run, tmp_path: Path, model: Path, texts: list[Path], sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.run_state import RunState

    arguments = ("saes", "--config", sweep, "--data", *texts, "--model", model, "--json", "--out")
    real, steps = RunState.advance, []

    def advance(state: RunState, batch: Any) -> bool:
        steps.append(state.step)
        if steps.count(5) == 1 and state.step == 5:  # a second one would not be held back
            os.kill(os.getpid(), signal.SIGINT)
        return real(state, batch)

    monkeypatch.setattr(RunState, "advance", advance)
    result = run(*arguments, tmp_path / "stopped")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (EXIT_INTERRUPTED, "sailguard: interrupted")
    assert len(list((tmp_path / "stopped" / "checkpoints").rglob("state.json"))) == 4
    monkeypatch.setattr(RunState, "advance", lambda state, batch: steps.append(state.step) or real(state, batch))
    steps.clear()
    resumed = json.loads(run(*arguments, tmp_path / "stopped").stdout)
    assert min(steps) == 6
    whole = json.loads(run(*arguments, tmp_path / "whole").stdout)
    for a, b in zip(resumed, whole, strict=True):
        assert a["fvu"] == b["fvu"]
        for file in ("sae_weights.safetensors",):
            stopped, plain = (tmp_path / out / "saes" / a["name"] / file for out in ("stopped", "whole"))
            assert stopped.read_bytes() == plain.read_bytes()


def test_what_is_wrong_is_one_line_that_names_the_place(
    run: Run, tmp_path: Path, model: Path, texts: list[Path], sweep: Path
) -> None:
    out = ("--out", tmp_path / "out")
    assert_error(run("saes", "--config", sweep, *out), "--data", "--cache")
    assert_error(run("saes", "--config", sweep, *out, "--data", texts[0], "--cache", tmp_path), "--data", "--cache")
    assert_error(run("saes", "--config", sweep, *out, "--data", tmp_path / "gone"), "gone", "--data")
    assert_error(run("saes", "--config", "gone.yaml", *out, "--data", texts[0]), "gone.yaml", "sweep-smollm2")
    assert_error(run("saes", "--config", sweep, *out, "--cache", tmp_path / "gone"), "gone")
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump({**SWEEP, "saes": [{"architecture": "topk", "options": {"k": 0}}]}))
    assert_error(run("saes", "--config", bad, *out, "--data", texts[0]), "bad.yaml", "saes.0.options.k")
    deep = tmp_path / "deep.yaml"
    deep.write_text(yaml.safe_dump({**SWEEP, "hook_points": ["blocks.9.hook_resid_post"]}))
    assert_error(run("saes", "--config", deep, *out, "--data", texts[0], "--model", model), "blocks.9")
    large = tmp_path / "large.yaml"
    large.write_text(yaml.safe_dump({**SWEEP, "batch_tokens": 100_000}))
    result = run("saes", "--config", large, *out, "--data", texts[0], "--model", model)
    assert result.exit_code == EXIT_ERROR
    assert "fewer than one batch of 100000" in result.stderr.splitlines()[-1]

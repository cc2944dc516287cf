"""`sae quality`, run on the tiny model and SAEs of known worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from feature_bank.formats.saelens import save_saelens
from feature_bank.sae import SAE
from service.cli import Commands
from service.commands.quality import quality, short_names

WIDTH = 32
Run = Callable[..., Any]


@pytest.fixture
def run(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Run:
    """Run the command on the tiny model and two rows of text."""
    model, data = tmp_path / "tiny", tmp_path / "rows.jsonl"
    tiny_model.save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    data.write_text('{"text": "A small bird sang."}\n{"text": "Nobody listened, 42 times."}\n')
    app = typer.Typer(cls=Commands)
    app.command("quality")(quality)
    app.command("other")(lambda: None)  # one command alone would have no name

    def invoke(*args: object) -> Any:
        words = ["quality", *map(str, args), "--model", str(model)]
        if "--data" not in words:
            words += ["--data", str(data)]
        return CliRunner().invoke(app, words, env={"COLUMNS": "120"})

    return invoke


def write_sae(folder: Path, *, scale: float = 1.0, model_name: str = "tiny", **metadata: Any) -> Path:
    """An SAE that gives back its input times `scale`."""
    eye = torch.eye(WIDTH)
    sae = SAE(
        W_enc=torch.cat([eye, -eye], dim=1),
        W_dec=torch.cat([eye, -eye]) * scale,
        b_enc=torch.zeros(2 * WIDTH),
        b_dec=torch.zeros(WIDTH),
        threshold=torch.zeros(2 * WIDTH),
        hook_name="blocks.1.hook_resid_post",
    )
    save_saelens(sae, folder, model_name=model_name, metadata=metadata)
    return folder


def test_a_perfect_and_a_worthless_sae_in_json(run: Run, tmp_path: Path) -> None:
    trained = {"training": {"fingerprint": {"config": {"architecture": "batch_topk"}}}}
    good, bad = write_sae(tmp_path / "good", **trained), write_sae(tmp_path / "bad", scale=0.0)
    result = run(good, bad, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    first, second = record["saes"]
    assert (first["name"], second["name"]) == ("good", "bad")
    assert (first["series"], second["series"]) == ("batch_topk", "standard")
    assert first["ce_loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert first["fvu"] == pytest.approx(0, abs=1e-9)
    assert second["ce_loss_recovered"] == 0
    assert record["model"] == "tiny"
    assert record["text"].startswith("2 rows of rows.jsonl (sha256 ")
    assert result.stderr == ""


def test_the_table_and_a_report(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr("training.report.write_report", lambda *args, **options: written.append((args, options)))
    saes = [write_sae(tmp_path / f"sae{i}", scale=i / 5) for i in range(6)]
    one = run(saes[0], "--ablation", "mean", "--splice-at", "all", "--format", "chat")
    assert one.exit_code == 0, one.output
    assert "explained_variance" in one.stdout
    assert "what mean ablation leaves" in one.stdout
    many = run(*saes, "--report", tmp_path / "report")
    assert many.exit_code == 0, many.output
    assert all(f"sae{i}" in many.stdout for i in range(6))
    ((folder, entries), options) = written[0]
    assert folder == tmp_path / "report"
    assert [entry.quality.name for entry in entries] == [f"sae{i}" for i in range(6)]
    assert options["provenance"]["model"] == "tiny"


def test_an_sae_of_another_model_is_noted(run: Run, tmp_path: Path) -> None:
    result = run(write_sae(tmp_path / "sae", model_name="other-model"), "--json")
    assert result.exit_code == 0
    assert "other-model" in result.stderr


def test_errors_are_one_line_before_the_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guard.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    sae = write_sae(tmp_path / "sae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for args, message in (
        ((tmp_path / "none",), "does not exist"),
        ((sae, sae), "named twice"),
        ((sae, "--data", tmp_path / "none.jsonl"), "no such file"),
        ((sae, "--report", tmp_path / "full"), "something else"),
    ):
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_other_formats_are_left_to_convert(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "ae.pt").write_bytes(b"not to be opened")
    (folder / "config.json").write_text("{}")
    result = run(folder)
    assert result.exit_code == 2
    assert "sailguard sae convert" in result.stderr


def test_names_are_the_shortest_that_differ() -> None:
    paths = [Path("/a/x/topk"), Path("/b/x/topk"), Path("/b/y/relu")]
    assert short_names(paths) == ["a/x/topk", "b/x/topk", "relu"]
    assert short_names([Path("/a/b"), Path("/x/a/b")]) == ["/a/b", "x/a/b"]

"""`train harvest` keeps activations on disk, says what it left out, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from guard.models import LoadedModel
from service.cli import build_app
from training.cache import open_harvest

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")


@pytest.fixture
def run(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    loaded = LoadedModel(tiny_model, tiny_tokenizer, "tiny")
    monkeypatch.setattr("guard.models.load_model", lambda *args, **options: loaded)
    rows = [{"text": f"{i:02d} is the number of a text"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))

    def invoke(*options: str) -> Result:
        hooks = [part for name in HOOKS for part in ("--hook-point", name)]
        command = ["train", "harvest", "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "cache")]
        return CliRunner().invoke(build_app(), [*command, *hooks, *options])

    return invoke


@pytest.mark.parametrize("text_format", ["chat", "plain"])
def test_a_harvest_can_be_read_back(run: Any, tmp_path: Path, text_format: str) -> None:
    result = run("--format", text_format, "--max-tokens", "10", "--shard-tokens", "60", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    cache = open_harvest(tmp_path / "cache")
    assert cache.hook_names == HOOKS
    assert cache.tokens == found["manifest"]["rows"] >= 20 * 10
    assert len(cache.shards) > 2
    assert found["texts"]["rows"] == 21
    assert (found["texts"]["repeated"], found["texts"]["cut"]) == (1, 20)
    assert found["manifest"]["text_format"] == text_format
    assert found["manifest"]["model_id"] == "tiny"  # the SAEs trained on it name the model they are for
    assert found["manifest"]["special_tokens"] == 20  # the one that begins each text
    assert "harvest" in result.stderr

    again = run("--format", text_format, "--max-tokens", "10", "--shard-tokens", "60")
    assert again.exit_code == 0
    assert "1 repeated" in again.stdout
    other = run("--format", text_format, "--max-tokens", "9", "--shard-tokens", "60")
    assert other.exit_code == 2
    assert "field 'sequences'" in other.stderr


def test_what_is_wrong_is_named_before_anything_is_written(run: Any, tmp_path: Path) -> None:
    for options, complaint in (
        (("--hook-point", "blocks.9.hook_resid_post"), "layers 0 to 3"),
        (("--hook-point", "layer 3"), "'layer 3' is not known"),
        (("--data", str(tmp_path / "missing.jsonl")), "missing.jsonl: no such file"),
    ):
        result = run(*options)
        assert result.exit_code == 2
        assert complaint in result.stderr
    assert not (tmp_path / "cache").exists()

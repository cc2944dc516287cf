"""`sae convert` and `sae info`, run for real on tiny files: what comes out loads, and nothing else is replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from feature_bank.formats import load_sae
from feature_bank.formats.saelens import load_saelens, save_saelens
from service.cli import EXIT_ERROR, build_app
from tests.feature_bank.formats import samples

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    def invoke(*args: object) -> Any:
        return CliRunner().invoke(build_app(), ["sae", *(str(arg) for arg in args)])

    return invoke


@pytest.fixture
def sail(tmp_path: Path) -> Path:
    return samples.write_torch(tmp_path / "ckpt_layer8.pt", samples.safe_sail_tensors())


def assert_error(result: Any, *parts: object) -> None:
    """One line on standard error, without a traceback."""
    assert result.exit_code == EXIT_ERROR
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    for part in parts:
        assert str(part) in result.stderr


def test_converted_folder_encodes_as_the_source(tmp_path: Path, run: Run) -> None:
    source = samples.make_sparsify(tmp_path / "layers.2")
    result = run("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "TopK, 5 per token" in result.stdout
    x = samples.normal(10, samples.D_IN)
    assert torch.equal(load_saelens(tmp_path / "out").encode(x), load_sae(source).encode(x))


def test_options_reach_the_format_and_the_source_is_recorded(tmp_path: Path, run: Run, sail: Path) -> None:
    args = ("--index", 2, "--k", 6, "--hook-name", "blocks.9.hook_mlp_out", "--model-name", "tiny", "--json")
    result = run("convert", sail, tmp_path / "out", "--format", "safe_sail", *args)
    assert result.exit_code == 0, result.stderr
    described = json.loads(result.stdout)
    assert (described["format"], described["k"], described["encoder_only"]) == ("safe_sail", 6, True)
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (cfg["hook_name"], cfg["model_name"]) == ("blocks.9.hook_mlp_out", "tiny")
    assert (cfg["sailguard"]["source_format"], cfg["sailguard"]["source_file"]) == ("safe_sail", sail.name)
    assert len(cfg["sailguard"]["source_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(cfg)


def test_info_tells_what_a_folder_holds_and_where_it_came_from(tmp_path: Path, run: Run, sail: Path) -> None:
    run("convert", sail, tmp_path / "out", "--index", 1, "--k", 6)
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert (facts["architecture"], facts["d_in"], facts["d_sae"]) == ("topk", samples.D_IN, samples.D_SAE)
    assert facts["notes"][0] == "SAE 1 of 3 that are stacked in the file."
    text = run("info", tmp_path / "out").stdout
    assert "blocks.8.hook_mlp_out" in text
    assert "neither reconstructs nor steers" in text


def test_info_on_a_transcoder_names_both_hook_points(tmp_path: Path, run: Run) -> None:
    save_saelens(samples.make_sae("jumprelu skip transcoder"), tmp_path / "a", model_name="tiny")
    assert "blocks.2.hook_mlp_in -> blocks.2.hook_mlp_out" in run("info", tmp_path / "a").stdout


def test_info_opens_no_archive(tmp_path: Path, run: Run, sail: Path) -> None:
    assert_error(run("info", sail), sail, "sailguard sae convert")
    assert_error(run("info", tmp_path / "absent"), tmp_path / "absent", "does not exist")


def test_errors_are_one_line_that_names_file_and_field(tmp_path: Path, run: Run, sail: Path) -> None:
    out = tmp_path / "out"
    assert_error(run("convert", sail, out), sail, "'index'")
    assert_error(run("convert", sail, out, "--format", "ghost"), "'format'", "known are")
    assert_error(run("convert", tmp_path / "absent", out), tmp_path / "absent", "does not exist")
    sail.write_bytes(sail.read_bytes()[:500])
    assert_error(run("convert", sail, out, "--index", 1), sail)
    assert not out.exists()


def test_a_folder_that_is_there_is_replaced_only_on_request(tmp_path: Path, run: Run) -> None:
    source, out = samples.make_sparsify(tmp_path / "layers.2"), tmp_path / "out"
    save_saelens(samples.make_sae("jumprelu"), out, model_name="tiny")
    before = (out / "cfg.json").read_bytes()
    assert_error(run("convert", source, out), out, "--overwrite")
    assert (out / "cfg.json").read_bytes() == before
    assert run("convert", source, out, "--overwrite").exit_code == 0
    assert load_saelens(out).k == 5


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_no_saelens_folder_is_never_replaced(tmp_path: Path, run: Run, overwrite: tuple[str, ...]) -> None:
    source = samples.make_sparsify(tmp_path / "layers.2")
    home, file, link = tmp_path / "home", tmp_path / "file", tmp_path / "link"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    file.write_text("x")
    link.symlink_to(home)
    for out in (home, file, link):
        assert_error(run("convert", source, out, *overwrite), out, "is not replaced")
    assert (home / "thesis.tex").read_text() == file.read_text() == "x"
    assert link.is_symlink()


def test_every_format_of_the_help_is_known(run: Run) -> None:
    from feature_bank.formats import FORMATS

    text = " ".join(run("convert", "--help").stdout.replace("│", " ").split())
    for name in FORMATS:
        assert name in text

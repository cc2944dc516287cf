"""`bank info`, `list`, `show` and `verify`, run for real on a tiny bank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_bank import DOMAINS, Bank, shipped_bank_path
from feature_bank.bank import MANIFEST
from tests.service.commands import assert_one_line_error, run


def test_a_bank_is_summarised_listed_and_shown(bank: Path) -> None:
    assert "tiny@1+" in run("bank", "info", bank).stdout
    info = json.loads(run("bank", "info", bank, "--json").stdout)
    assert (info["features"], info["content_hash"]) == (2, Bank.load(bank).content_hash)
    listed = json.loads(run("bank", "list", bank, "--json").stdout)
    assert [feature["id"] for feature in listed] == ["L1/1", "L1/0"]  # by auroc
    assert len(json.loads(run("bank", "list", bank, "--limit", 1, "--json").stdout)) == 1
    only = json.loads(run("bank", "list", bank, "--domain", "politics", "--layer", 1, "--json").stdout)
    assert [feature["id"] for feature in only] == ["L1/0"]
    assert "always on" in run("bank", "list", bank).stdout
    assert "always on" in run("bank", "show", "L1/1", bank).stdout
    assert json.loads(run("bank", "show", "L1/1", bank, "--json").stdout)["id"] == "L1/1"


def test_an_explanation_is_printed_as_it_is(tmp_path: Path, write_bank: Callable[..., Path]) -> None:
    folder = write_bank(tmp_path / "odd", explanation="[bold]x[/nothing] \x1b[2J")
    for arguments in (("list", folder), ("show", "L1/1", folder)):
        result = run("bank", *arguments)
        assert result.exit_code == 0
        assert "[bold]x[/nothing] \ufffd[2J" in result.stdout


def test_verify_finds_an_altered_file(bank: Path) -> None:
    assert run("bank", "verify", bank).exit_code == 0
    with (bank / "features.jsonl").open("a") as file:
        file.write("\n")
    assert_one_line_error(run("bank", "verify", bank), "features.jsonl", "sha256")


def test_verify_with_a_model_checks_identity_and_canary(
    tmp_path: Path, bank: Path, model: Path, write_bank: Callable[..., Path]
) -> None:
    result = run("bank", "verify", bank, "--model", model, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verified"] == ["schema", "hashes", "identity", "canary"]
    other = write_bank(tmp_path / "a", canary=2.0)
    assert_one_line_error(run("bank", "verify", other, "--model", model), "canary")
    other = write_bank(tmp_path / "b", identity={"tokenizer_hash": "0" * 64})
    assert_one_line_error(run("bank", "verify", other, "--model", model), "tokenizer_hash")


def test_the_shipped_bank_is_whole() -> None:
    if not (shipped_bank_path() / MANIFEST).exists():
        pytest.skip("the shipped bank is not in this checkout")
    assert run("bank", "verify").exit_code == 0
    assert set(json.loads(run("bank", "info", "--json").stdout)["features_by_head"]) == set(DOMAINS)

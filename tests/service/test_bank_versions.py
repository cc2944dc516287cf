"""`bank diff`, `promote`, `rollback` and `versions` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feature_bank.bank import FEATURES, Bank
from feature_bank.review import rejected_ids
from tests.feature_bank.variants import write_variant
from tests.service.commands import assert_one_line_error, run


@pytest.fixture
def other(bank: Path, tmp_path: Path) -> Path:
    """The bank with another label, a moved weight and threshold, and better quality."""
    write_variant(
        Bank.load(bank),
        tmp_path / "other",
        version="2",
        features=lambda f: {"explanation": "[red]on[/red]", "domains": ["terror"]} if f.id == "L1/1" else {},
        heads=lambda d, h: {"weights": [0.7], "thresholds": {"0.01": 0.6}} if d == "violence" else {},
        quality={"dev_auroc_violence": 0.9},
    )
    return tmp_path / "other"


def test_the_same_bank_makes_no_difference(bank: Path) -> None:
    result = run("bank", "diff", bank, bank)
    assert (result.exit_code, result.stdout) == (0, "no difference\n")
    assert json.loads(run("bank", "diff", bank, bank, "--json", "--exit-code").stdout)["same"] is True


def test_a_difference_is_shown_and_told_by_the_exit_code(bank: Path, other: Path) -> None:
    result = run("bank", "diff", bank, other)
    assert result.exit_code == 0
    for part in ("tiny@1+", "tiny@2+", "[red]on[/red]", "violence", "terror", "0.6", "+0.1", "dev_auroc_violence"):
        assert part in result.stdout
    assert run("bank", "diff", bank, other, "--exit-code").exit_code == 1
    found = json.loads(run("bank", "diff", bank, other, "--json").stdout)
    assert [change["name"] for change in found["relabelled"]["L1/1"]] == ["domains", "explanation"]
    assert found["heads"][0]["weights"] == [{"name": "L1/1", "before": 0.1, "after": 0.7}]
    assert found["thresholds"][0] == {
        "domain": "violence",
        "kind": "whole",
        "rate": "0.01",
        "before": 0.5,
        "after": 0.6,
    }
    assert_one_line_error(run("bank", "diff", bank, bank.parent / "gone"), "gone")


def test_versions_are_promoted_listed_and_rolled_back(bank: Path, other: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first, second = Bank.load(bank).version, Bank.load(other).version
    assert f"{first} is now the current version" in run("bank", "promote", bank, "--store", store).stdout
    review = ("bank", "review", store, "--feature", "L1/1", "--reject", "--reason", "x", "--reviewer", "ann")
    assert run(*review).exit_code == 0
    promoted = json.loads(run("bank", "promote", other, "--store", store, "--json").stdout)
    assert promoted == {"version": second, "previous": first, "changed": True, "reviews_carried": 1}
    assert rejected_ids(store) == {"L1/1"}
    for path in (store, store / "current"):
        assert second in run("bank", "info", path).stdout
    assert f"at {first}" in run("bank", "show", "L1/1", store).stdout  # the review names where it was given
    table = run("bank", "versions", "--store", store)
    assert table.exit_code == 0
    assert f"* {second}" in " ".join(table.stdout.split())
    rows = json.loads(run("bank", "versions", "--store", store, "--json").stdout)
    assert [(row["version"], row["current"], row["reviews"]) for row in rows] == [(first, False, 1), (second, True, 1)]
    back = run("bank", "rollback", "--store", store)
    assert f"{first} is now the current version (before: {second})" in back.stdout
    assert json.loads(run("bank", "rollback", "--store", store, "--to", "2", "--json").stdout)["version"] == second
    again = run("bank", "promote", other, "--store", store)
    assert f"{second} is the current version" in again.stdout


def test_what_cannot_be_done_is_one_line(bank: Path, other: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert_one_line_error(run("bank", "versions", "--store", store), "bank promote")
    assert_one_line_error(run("bank", "rollback", "--store", store), "bank promote")
    run("bank", "promote", bank, "--store", store)
    assert_one_line_error(run("bank", "rollback", "--store", store), "--to")
    assert_one_line_error(run("bank", "rollback", "--store", store, "--to", "9"), "'9'", "tiny@1+")
    with (other / FEATURES).open("a") as file:
        file.write("\n")
    assert_one_line_error(run("bank", "promote", other, "--store", store), "features.jsonl", "sha256")
    assert_one_line_error(run("bank", "promote", other, "--store", bank), "sha256")
    assert [row["current"] for row in json.loads(run("bank", "versions", "--store", store, "--json").stdout)] == [True]


def test_a_damaged_version_is_listed_with_exit_code_1(bank: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("bank", "promote", bank, "--store", store)
    (store / "current" / FEATURES).unlink()
    result = run("bank", "versions", "--store", store)
    assert result.exit_code == 1
    assert "damaged" in result.stdout
    assert FEATURES in result.stdout

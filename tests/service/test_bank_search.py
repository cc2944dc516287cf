"""`bank search` and the filters of `bank list` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feature_bank.bank import Bank
from feature_bank.schema import (
    Causality,
    ConceptScore,
    Duplicate,
    Evidence,
    Explainer,
    Predicate,
    PredicateTerm,
    SimulationScore,
)
from tests.feature_bank.variants import write_variant
from tests.service.commands import assert_one_line_error, run

FULL: dict[str, Any] = {
    "explanation": "选举 and [b]votes[/b]",
    "concepts": ["election_campaign"],
    "explainer": Explainer(method="executable"),
    "predicate": Predicate(bias=-3.5, terms=[PredicateTerm(kind="token", text="vote", weight=2.25)]),
    "kind": "conceptual",
    "lexicality": 0.25,
    "fidelity": [
        SimulationScore(
            level="segment",
            simulator="executable",
            n=210,
            missing=3,
            corr=0.456,
            corr_low=0.4,
            corr_high=0.5,
            corr_null=0.123,
            corr_null_mean=0.01,
            auroc=0.81,
        )
    ],
    "concept_scores": [
        ConceptScore(domain="politics", concept="election_campaign", pairs=8, frequency=0.75, reverse=0.0, q=0.01)
    ],
    "causality": Causality(texts=32, effects={"politics": -0.42}, low={"politics": -0.5}, high={"politics": -0.3}),
    "admitted": False,
    "refusals": ["lookalike_fpr_politics above 0.1"],
    "duplicates": [Duplicate(id="L1/1", correlation=0.93)],
    "evidence": [Evidence(text="a vote", peak="vote", activation=1.2, tokens=["a", " vote"], activations=[0.0, 1.2])],
}


@pytest.fixture
def bank(tmp_path: Path, write_bank: Callable[..., Path]) -> Path:
    """L1/0 has every field that a record may have."""
    plain = write_bank(tmp_path / "plain")
    write_variant(Bank.load(plain), tmp_path / "bank", features=lambda f: FULL if f.id == "L1/0" else {})
    return tmp_path / "bank"


def found(*args: object) -> list[str]:
    result = run("bank", *args, "--json")
    assert result.exit_code == 0, result.stderr
    return [feature["id"] for feature in json.loads(result.stdout)]


def test_a_search_prints_what_matches_best_first(bank: Path) -> None:
    assert found("search", "votes", bank) == ["L1/0"]
    assert found("search", "选举", bank) == ["L1/0"]
    assert found("search", "on", bank) == ["L1/1"]
    assert found("search", "weather", bank) == []
    shown = run("bank", "search", "vote", bank)
    assert shown.exit_code == 0
    for part in ("L1/0", "[b]votes[/b]", "1 of 1 features"):
        assert part in shown.stdout
    (hit,) = json.loads(run("bank", "search", "vote", bank, "--json").stdout)
    assert hit["relevance"] > 0
    assert set(hit["found_in"]) == {"explanation", "terms", "evidence"}
    assert hit["effective"]["status"] == "unreviewed"


def test_list_and_search_take_the_same_filters(bank: Path) -> None:
    for command in (("list", bank), ("search", "L1", bank)):
        assert found(*command) == ["L1/1", "L1/0"] or set(found(*command)) == {"L1/0", "L1/1"}
        for args, wanted in (
            (("--concept", "election_campaign"), ["L1/0"]),
            (("--concept", "politics/election_campaign"), ["L1/0"]),
            (("--domain", "violence"), ["L1/1"]),
            (("--layer", 2), []),
            (("--admitted",), ["L1/1"]),
            (("--status", "rejected"), []),
            (("--min-score", 0.8), ["L1/1"]),
            (("--min-score", "auroc_politics=0.5"), ["L1/0"]),
            (("--min-score", "corr=0.4", "--min-score", "frequency=0.7"), ["L1/0"]),
            (("--limit", 1, "--status", "unreviewed", "--domain", "politics"), ["L1/0"]),
        ):
            assert found(*command, *args) == wanted, args


def test_what_is_wrong_is_one_line(bank: Path) -> None:
    assert_one_line_error(run("bank", "search", " ", bank), "empty")
    for command in (("list", bank), ("search", "vote", bank)):
        assert_one_line_error(run("bank", *command, "--domain", "weather"), "weather")
        assert_one_line_error(run("bank", *command, "--concept", "weather"), "weather", "taxonomy list")
        assert_one_line_error(run("bank", *command, "--min-score", "x=1"), "'x'", "auroc")
        assert_one_line_error(run("bank", *command, "--min-score", "auroc=high"), "auroc=high")
    assert run("bank", "search", '" OR (NEAR* \x00', bank).exit_code == 0


def test_show_prints_every_field(bank: Path) -> None:
    shown = run("bank", "show", "L1/0", bank).stdout
    for part in (
        "选举 and [b]votes[/b]",
        "executable",
        "log-odds -3.50; +2.25 token 'vote'",
        "conceptual (the token alone explains 25%)",
        "no: lookalike_fpr_politics above 0.1",
        "segment level by executable: corr 0.456 [0.400, 0.500], null 0.123 (mean 0.010)",
        "AUROC 0.810, n 210, 3 missing",
        "politics/election_campaign 0.75 of 8 pairs",
        "politics -0.420 [-0.500, -0.300] (logits, over 32 texts)",
        "L1/1 (correlation 0.93)",
        "1.20 at 'vote': a vote",
    ):
        assert part in shown
    card = json.loads(run("bank", "show", "L1/0", bank, "--json").stdout)
    assert (card["admitted"], card["in_heads"], card["reviews"]) == (False, {}, [])
    assert card["fidelity"][0]["corr"] == 0.456

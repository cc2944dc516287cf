"""`sailguard policy`: what it says of shipped policies and of files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feature_bank.bank import Bank, shipped_bank_path
from guard.policy import Policy
from guard.policy_file import shipped_policies
from guard.policy_loading import PolicyFile
from service.cli import EXIT_ERROR, build_app


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), ["policy", *map(str, arguments)])


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_can_be_used_with_the_shipped_bank(name: str) -> None:
    result = run("check", name)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{Policy.load(name).version}: 4 rules, usable with smollm2-135m-instruct@")
    assert json.loads(run("check", name, "--json").stdout)["policy"] == Policy.load(name).version


def test_a_policy_is_said_in_words_and_in_figures(tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "name: mine\nrefusal: STOP\non_error: flag\nrules:\n"
        "- {domain: violence, threshold: {probability: 0.75}, evidence_tokens: 1, action: block, scope: [response]}\n"
        "- {domain: terror, threshold: {fpr: 0.01}, action: steer, steer: {op: clamp, value: 0.5, prompt: true}}\n"
    )
    said = run("explain", policy).stdout
    assert "violence-block: violence stops the generation" in said
    assert "answers as they come: at a probability of 0.750 on 1 token" in said
    assert "terror is steered from the next token on, the prompt's own tokens too: the domain's activation" in said
    assert "is held at 0.5 of its scale, by at most 1 of a token's norm" in said
    assert "(1 % of the calibration's negatives reach it)" in said
    assert "If the guard itself fails: the generation goes on, and its report is flagged." in said
    assert "A blocked answer ends with: STOP" in said
    found = json.loads(run("explain", policy, "--json").stdout)
    block, steer = found["rules"]
    assert set(block["when"]) == {"response", "whole response"}
    assert block["thresholds"]["response"] == 0.75
    assert set(steer["when"]) == {"prompt", "response", "whole response"}
    assert (found["on_error"], found["refusal"]) == ("flag", "STOP")


def test_rules_on_concepts_and_features_are_said_in_words(tmp_path: Path) -> None:
    bank = Bank.load(shipped_bank_path())
    feature = bank.features[0]
    concept = next(concept for f in bank.features for concept in f.concepts)
    n = sum(concept in f.concepts for f in bank.features)
    path = tmp_path / "p.yaml"
    path.write_text(
        f"rules:\n- {{feature: {feature.id}, threshold: {{activation: 0.4}}, action: block}}\n"
        f"- {{concept: {concept}, threshold: {{activation: 0.8}}, action: steer, steer: {{op: ablate}}}}\n"
    )
    said = run("explain", path).stdout
    assert f"{feature.id}-block: {feature.id} stops the generation" in said
    assert "prompts: where the feature is at 0.4 of its 99.9th percentile on 1 token" in said
    assert f"{concept} is steered from the next token on: the concept's activation is taken out" in said
    assert f"answers as they come: where any of {n} features is at 0.8 of its 99.9th percentile on 1 token" in said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rules:\n  - {domain: terror, action: flag}\n", ["line 2, column 5", "'threshold' is missing"]),
        ("rules: [{domain: terror, threshold: {fpr: 0.02}, action: flag}]\n", ["line 1", "0.02", "0.001, 0.01, 0.05"]),
    ],
)
@pytest.mark.parametrize("command", ["check", "explain"])
def test_a_policy_that_cannot_be_used_is_one_line_of_error(
    tmp_path: Path, text: str, parts: list[str], command: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    result = run(command, path)
    assert result.exit_code == EXIT_ERROR
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in [str(path), *parts])


def test_a_name_that_is_neither_file_nor_shipped_is_told_the_shipped_ones() -> None:
    result = run("check", "balancd")
    assert result.exit_code == EXIT_ERROR
    assert "balanced, monitor, strict" in result.stderr


def test_the_schema_is_printed_as_json() -> None:
    assert json.loads(run("schema").stdout) == PolicyFile.model_json_schema()

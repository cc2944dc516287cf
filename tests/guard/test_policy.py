"""Policies: the default, the file's schema, and errors that name the file and the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from feature_bank import DOMAINS
from guard.errors import PolicyError
from guard.heads import DomainHeads
from guard.monitor import Monitor
from guard.policy import Policy
from guard.policy_file import shipped_policies
from guard.policy_loading import MAX_DEPTH, PolicyFile
from guard.rules import bind_rules
from tests.factories import make_bank, make_policy

RULE = {"domain": "violence", "threshold": {"probability": 0.8}, "action": "block"}


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_default_flags_politics_and_blocks_the_rest() -> None:
    policy = Policy.default()
    assert {rule.domain: rule.action for rule in policy.rules} == {
        domain: "flag" if domain == "politics" else "block" for domain in DOMAINS
    }
    assert {rule.threshold.fpr for rule in policy.rules} == {0.01}
    assert {rule.scope for rule in policy.rules} == {("prompt", "response")}
    assert policy.on_error == "block"


def test_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    policy = Policy.load(write(tmp_path / "p.yaml", {"name": "mine", "rules": [RULE]}))
    assert (policy.name, policy.on_error, policy.rules[0].scope) == ("mine", "block", ("prompt", "response"))
    assert policy.rules[0].evidence_tokens is None
    assert policy.rules[0].label == "violence-block"


def test_version_follows_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    first = Policy.load(write(path, {"rules": [RULE]})).version
    assert first == Policy.load(write(path, {"rules": [RULE], "on_error": "block"})).version
    assert first != Policy.load(write(path, {"rules": [RULE], "on_error": "allow"})).version
    assert first.startswith("default+")
    assert Policy.default().version == "default+bb52d98d"  # it stands in published results


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"rules": [{**RULE, "threshold": {}}]}, "rules.0.threshold"),
        ({"rules": [{**RULE, "threshold": {"probability": 0.5, "fpr": 0.01}}]}, "rules.0.threshold"),
        ({"rules": [{**RULE, "threshold": {"probability": 1.0}}]}, "rules.0.threshold.probability"),
        ({"rules": [{**RULE, "threshold": {"probability": float("nan")}}]}, "rules.0.threshold.probability"),
        ({"rules": [{**RULE, "threshold": {"fpr": 0}}]}, "rules.0.threshold.fpr"),
        ({"rules": [{**RULE, "domain": "weather"}]}, "rules.0.domain"),
        ({"rules": [{**RULE, "feature": "L1/2"}]}, "rules.0"),
        ({"rules": [{"threshold": {"probability": 0.5}, "action": "flag"}]}, "rules.0"),
        ({"rules": [{**RULE, "threshold": {"activation": 0.5}}]}, "rules.0"),
        ({"rules": [{"feature": "L1/2", "threshold": {"fpr": 0.01}, "action": "flag"}]}, "rules.0"),
        ({"rules": [{"feature": "12", "threshold": {"activation": 0.5}, "action": "flag"}]}, "rules.0.feature"),
        ({"rules": [{"feature": "L1/2", "threshold": {"activation": -1}}]}, "rules.0.threshold.activation"),
        ({"rules": [RULE, {**RULE, "action": "shout", "name": "x"}]}, "rules.1.action"),
        ({"rules": [{**RULE, "scope": ["prompt", "thoughts"]}]}, "rules.0.scope.1"),
        ({"rules": [{**RULE, "scope": []}]}, "rules.0.scope"),
        ({"rules": [{**RULE, "evidence_tokens": 0}]}, "rules.0.evidence_tokens"),
        ({"rules": [{**RULE, "surprise": 1}]}, "rules.0.surprise"),
        ({"rules": [{**RULE, "cooldown_tokens": 3}]}, "rules.0"),
        ({"rules": [{**RULE, "action": "flag", "scope": ["prompt"], "cooldown_tokens": 3}]}, "rules.0"),
        ({"rules": [{**RULE, "action": "flag", "cooldown_tokens": 0}]}, "rules.0.cooldown_tokens"),
        ({"rules": [{**RULE, "action": "steer", "steer": {"op": "push"}}]}, "rules.0.steer.op"),
        ({"rules": [{**RULE, "action": "steer", "steer": {"strength": 11}}]}, "rules.0.steer.strength"),
        ({"rules": [RULE], "on_error": "panic"}, "on_error"),
        ({"rules": [RULE], "surprise": 1}, "surprise"),
        ({"name": "x"}, "rules"),
        ({"rules": [RULE, RULE]}, "rules"),
    ],
)
def test_error_names_file_and_field(tmp_path: Path, data: object, field: str) -> None:
    path = write(tmp_path / "p.yaml", data)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert repr(str(path)) in str(error.value)
    assert f"field {field!r}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        ("rules:\n  - domain: violence\n    treshold: {fpr: 0.01}\n    action: block\n", (3, 5), "no such field"),
        ("rules:\n  - {domain: weather, threshold: {fpr: 0.01}, action: block}\n", (2, 6), "rules.0.domain"),
        (
            "name: x\nrules:\n- domain: terror\n  threshold:\n    fpr: 7\n  action: flag\n",
            (5, 5),
            "rules.0.threshold.fpr",
        ),
        ("name: x\non_error: panic\nrules: []\n", (2, 1), "on_error"),
        ("rules:\n  - domain: terror\n    action: flag\n", (2, 5), "'threshold' is missing"),
        ("name: x\n", (1, 1), "rules"),
        ("rules:\n  - {domain: terror\n    action: flag}\n", (3, 11), "not valid YAML"),
        ("rules: &r [*r]\n", (1, 8), "rules.0"),
    ],
)
def test_error_names_line_and_column(tmp_path: Path, text: str, place: tuple[int, int], part: str) -> None:
    path = write(tmp_path / "p.yaml", text)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert f"line {place[0]}, column {place[1]}" in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_load_by_name_and_fit_any_bank_with_all_heads(
    name: str, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    policy = Policy.load(name)
    assert policy.name == name
    assert {rule.domain for rule in policy.rules} == set(DOMAINS)
    assert {rule.action for rule in policy.rules if rule.domain == "politics"} == {"flag"}
    assert policy.on_error != "allow"
    Monitor(make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer), policy, torch.device("cpu"))


def test_balanced_is_what_applies_without_a_file() -> None:
    assert Policy.load("balanced").rules == Policy.default().rules
    assert Policy.load("balanced").refusal == Policy.default().refusal
    assert {rule.action for rule in Policy.load("monitor").rules} == {"flag"}


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "strict", {"name": "mine", "rules": [RULE]})
    assert Policy.load("strict").name == "mine"


BLOCK = {"domain": "violence", "threshold": {"probability": 0.7}, "evidence_tokens": 3, "action": "block"}


@pytest.mark.parametrize(
    ("rule", "reachable"),
    [
        ({"threshold": {"probability": 0.8}, "action": "steer"}, False),
        ({"threshold": {"probability": 0.7}, "evidence_tokens": 4, "action": "flag"}, False),
        ({"threshold": {"probability": 0.8}, "action": "block", "name": "late"}, False),
        ({"threshold": {"probability": 0.8}, "action": "flag", "scope": ["response"]}, False),
        ({"threshold": {"probability": 0.7}, "evidence_tokens": 3, "action": "flag"}, True),
        ({"threshold": {"probability": 0.6}, "evidence_tokens": 9, "action": "flag"}, True),
        ({"threshold": {"probability": 0.8}, "evidence_tokens": 2, "action": "flag"}, True),
        ({"domain": "terror", "threshold": {"probability": 0.8}, "action": "flag"}, True),
    ],
)
def test_a_rule_that_can_never_act_is_refused_with_its_place(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, rule: dict[str, Any], reachable: bool
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    rule = {"domain": "violence", "evidence_tokens": 3, **rule}
    policy = Policy.load(write(tmp_path / "p.yaml", {"rules": [BLOCK, rule]}))
    if reachable:
        Monitor(bank, policy, torch.device("cpu"))
        return
    with pytest.raises(PolicyError, match=r"line \d+, column 3, rule .*it can never act, for 'violence-block' blocks"):
        Monitor(bank, policy, torch.device("cpu"))
    # where the block does not stand, the rule can act
    elsewhere = {"rules": [{**BLOCK, "scope": ["prompt"]}, {**rule, "scope": ["prompt", "response"]}]}
    Monitor(bank, Policy.load(write(tmp_path / "q.yaml", elsewhere)), torch.device("cpu"))


def test_what_the_bank_does_not_hold_is_refused_with_its_place(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    path = write(tmp_path / "p.yaml", "rules:\n  - {domain: terror, threshold: {fpr: 0.02}, action: flag}\n")
    with pytest.raises(PolicyError, match=r"line 2, column 34, rule 'terror-flag', field 'threshold\.fpr'"):
        Monitor(bank, Policy.load(path), torch.device("cpu"))


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        ("feature: L77/1, threshold: {activation: 0.5}", "the bank has no feature 'L77/1'"),
        ("concept: politics/nonsense, threshold: {activation: 0.5}", "no feature of the bank has the concept"),
        ("feature: FIRST, threshold: {activation: 50}", "no activation reaches 50"),
    ],
)
def test_a_feature_or_concept_that_nothing_can_come_of_is_refused_with_its_place(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, rule: str, part: str
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    path = tmp_path / "p.yaml"
    path.write_text(f"rules:\n  - {{{rule.replace('FIRST', bank.features[0].id)}, action: flag}}\n")
    with pytest.raises(PolicyError, match=r"line 2, column \d+") as error:
        Monitor(bank, Policy.load(path), torch.device("cpu"))
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("allow", "rules", "part"),
    [
        ("[politics/nonsense]", "", "no feature of the bank has the concept 'politics/nonsense'"),
        ("[CONCEPT]", "\n  - {concept: CONCEPT, threshold: {activation: 0.5}, action: flag}", "remove either"),
    ],
)
def test_what_cannot_be_allowed_is_refused_with_its_place(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, allow: str, rules: str, part: str
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    concept = "terror/attack"
    features = (bank.features[0].model_copy(update={"concepts": [concept]}), *bank.features[1:])
    text = f"rules:\n  - {{domain: terror, threshold: {{fpr: 0.01}}, action: flag}}{rules}\nallow: {allow}\n"
    path = tmp_path / "p.yaml"
    path.write_text(text.replace("CONCEPT", concept))
    with pytest.raises(PolicyError, match=r"line \d, column 9, field 'allow\.0'") as error:
        Monitor(replace(bank, features=features), Policy.load(path), torch.device("cpu"))
    assert part in str(error.value)


def test_an_overlay_changes_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    base = {"name": "base", "refusal": "NO", "on_error": "flag", "rules": [RULE, {**RULE, "domain": "terror"}]}
    write(tmp_path / "base.yaml", base)
    stricter = {**RULE, "threshold": {"probability": 0.6}}
    extra = {"domain": "politics", "threshold": {"fpr": 0.01}, "action": "flag"}
    overlay = {"extends": "base.yaml", "refusal": "TENANT", "rules": [extra, stricter], "without": ["terror-block"]}
    policy = Policy.load(write(tmp_path / "acme.yaml", overlay))
    assert type(policy) is Policy
    assert [rule.label for rule in policy.rules] == ["violence-block", "politics-flag"]
    assert policy.rules[0].threshold == Policy.model_validate({"rules": [stricter]}).rules[0].threshold
    assert (policy.name, policy.refusal, policy.on_error) == ("base", "TENANT", "flag")
    assert (
        Policy.load(write(tmp_path / "same.yaml", {"extends": "base.yaml"})).version
        == Policy.load(tmp_path / "base.yaml").version
    )
    deeper = {"extends": "acme.yaml", "name": "deeper", "rules": [{**RULE, "domain": "terror"}]}
    assert [r.label for r in Policy.load(write(tmp_path / "d.yaml", deeper)).rules] == [
        "violence-block",
        "politics-flag",
        "terror-block",
    ]
    again = {"extends": "base.yaml", "without": ["violence-block"], "rules": [stricter]}
    assert [r.label for r in Policy.load(write(tmp_path / "a.yaml", again)).rules] == ["terror-block", "violence-block"]


def test_an_overlay_extends_a_shipped_policy_by_name_and_a_file_beside_it_first(tmp_path: Path) -> None:
    quieter = {"extends": "strict", "without": ["politics-flag"]}
    path = write(tmp_path / "p.yaml", quieter)
    assert [r.label for r in Policy.load(path).rules] == ["pornography-block", "violence-block", "terror-block"]
    write(tmp_path / "strict", {"rules": [{**RULE, "domain": "politics", "action": "flag"}]})
    assert Policy.load(path).rules == ()


@pytest.mark.parametrize(
    ("overlay", "parts"),
    [
        ("extends: nowhere.yaml\n", ["line 1, column 1, field 'extends'", "nowhere.yaml"]),
        ("extends: balanced\nwithout: [no-such]\n", ["line 2, column 11, field 'without.0'", "politics-flag"]),
        ("without: [x]\nrules: []\n", ["line 1, column 1", "needs 'extends'"]),
        ("extends: p.yaml\n", ["field 'extends'", "in a circle"]),
        ("extends: broken.yaml\n", ["p.yaml', line 1", "broken.yaml', line 2, column 6", "rules.0.domain"]),
    ],
)
def test_an_overlay_that_cannot_be_laid_is_refused_with_its_place(
    tmp_path: Path, overlay: str, parts: list[str]
) -> None:
    write(tmp_path / "broken.yaml", "rules:\n  - {domain: weather, threshold: {fpr: 0.01}, action: flag}\n")
    path = write(tmp_path / "p.yaml", overlay)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert all(part in str(error.value) for part in parts)


def test_a_long_chain_of_overlays_ends_in_an_error(tmp_path: Path) -> None:
    for number in range(MAX_DEPTH + 2):
        write(tmp_path / f"{number}.yaml", {"extends": f"{number + 1}.yaml"})
    with pytest.raises(PolicyError, match=f"more than {MAX_DEPTH} deep"):
        Policy.load(tmp_path / "0.yaml")


def test_a_rule_of_the_base_that_fails_is_told_by_its_place_in_the_base(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    write(tmp_path / "base.yaml", "rules:\n  - {domain: terror, threshold: {fpr: 0.02}, action: flag}\n")
    path = write(tmp_path / "p.yaml", "extends: base.yaml\nrules: []\n")
    with pytest.raises(PolicyError, match=r"base\.yaml', line 2, column 34, rule 'terror-flag'"):
        Monitor(bank, Policy.load(path), torch.device("cpu"))


def test_the_published_schema_is_the_one_that_applies() -> None:
    published = Path(__file__).parents[2] / "docs" / "policy.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == PolicyFile.model_json_schema(), (
        "run `sailguard policy schema > docs/policy.schema.json`"
    )


@pytest.mark.parametrize("text", ["", "[1]", "just text", "rules: [", "!!python/object:os.system {}", "\t"])
def test_file_that_is_no_policy_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "p.yaml", text)
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert repr(str(path)) in str(error.value)


def test_missing_and_binary_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.yaml"):
        Policy.load(tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(PolicyError, match=r"b\.yaml"):
        Policy.load(tmp_path / "b.yaml")


def test_rules_that_a_verdict_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", {"rules": [RULE, {**RULE, "scope": ["response"]}]})
    with pytest.raises(PolicyError, match="rules 0 and 1 are both called 'violence-block'"):
        Policy.load(path)
    named = {"rules": [RULE, {**RULE, "scope": ["response"], "name": "late"}]}
    assert [rule.label for rule in Policy.load(write(path, named)).rules] == ["violence-block", "late"]


def test_a_rule_that_steers_what_has_no_decoder_is_refused_and_one_that_flags_is_not(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer)
    rows = {name: replace(part, W_dec=np.zeros_like(part.W_dec)) for name, part in bank.rows.items()}
    encoders_only = replace(bank, rows=rows)
    heads = DomainHeads(bank)
    for action, steer in (("flag", None), ("steer", {"op": "ablate"})):
        rule = {"domain": "terror", "scope": ["response"], "action": action, **({"steer": steer} if steer else {})}
        policy = make_policy(rule)
        bind_rules(policy, bank, heads, "response", streaming=True)
        if steer is None:
            bind_rules(policy, encoders_only, heads, "response", streaming=True)
        else:
            with pytest.raises(PolicyError, match="no decoder rows for the features of 'terror'"):
                bind_rules(policy, encoders_only, heads, "response", streaming=True)

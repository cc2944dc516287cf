"""What the environment says is read with its mistakes named, and requests get no more than their tenant may ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from feature_bank.errors import BankError
from guard.engines.vllm.config import (
    Config,
    Options,
    Rules,
    Tenant,
    own_rules,
    read_config,
    refuse_prompt_steering,
    wanted,
)
from guard.errors import GuardError, PolicyError
from guard.monitor import Monitor
from guard.policy import Policy
from guard.steering_request import steering_rule
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank

CPU = torch.device("cpu")
STEER = {"domain": "violence", "action": "steer", "name": "away"}


@pytest.fixture
def config(bank_of: MakeBank) -> Config:
    policy = make_policy(STEER)
    tenants = {"": Tenant(policy, overrides=False), "lab": Tenant(policy, overrides=True)}
    bank = bank_of(**VARIED)
    first, *others = bank.features
    features = (first.model_copy(update={"concepts": ["violence/gore"]}), *others)
    return Config(replace(bank, features=features), tenants, 4)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def named(folder: Path, name: str) -> str:
    """A policy file of that name."""
    rule = "rules: [{domain: violence, threshold: {probability: 0.5}, action: flag}]"
    return write(folder / f"{name}.yaml", f"name: {name}\n{rule}\n")


def test_a_guard_is_wanted_if_any_of_its_variables_is_set() -> None:
    assert not wanted({})
    assert not wanted({"SAILGUARD_BANK": "", "SAILGUARD_STEERING_PROGRAMS": "3"})
    for name in ("SAILGUARD_BANK", "SAILGUARD_POLICY", "SAILGUARD_TENANTS"):
        assert wanted({name: "x"})


def test_what_is_not_given_is_the_shipped_bank_and_the_default_policy() -> None:
    config = read_config({})
    shipped = read_config({"SAILGUARD_BANK": "shipped"})
    assert config.bank.content_hash == shipped.bank.content_hash
    assert dict(config.tenants) == {"": Tenant(Policy.default(), overrides=False)}
    assert config.programs == 16


def test_tenants_have_their_own_policies_or_the_common_one(tmp_path: Path) -> None:
    listed = f"tenants:\n  lab: {{policy: {named(tmp_path, 'lab')}, overrides: true}}\n  shop.1: {{}}\n"
    environ = {
        "SAILGUARD_POLICY": named(tmp_path, "common"),
        "SAILGUARD_TENANTS": write(tmp_path / "tenants.yaml", listed),
        "SAILGUARD_STEERING_PROGRAMS": "3",
    }
    config = read_config(environ)
    assert {name: (t.policy.name, t.overrides) for name, t in config.tenants.items()} == {
        "": ("common", False),
        "lab": ("lab", True),
        "shop.1": ("common", False),
    }
    assert config.programs == 3


def test_the_tenants_file_may_name_the_default_policy(tmp_path: Path) -> None:
    listed = f"default: {{policy: {named(tmp_path, 'own')}}}\ntenants: {{lab: {{}}}}\n"
    config = read_config({"SAILGUARD_TENANTS": write(tmp_path / "t.yaml", listed)})
    assert config.tenants[""].policy.name == "own"
    assert config.tenants["lab"].policy.name in ("own", "default")


def test_an_empty_tenants_file_is_one_without_tenants(tmp_path: Path) -> None:
    config = read_config({"SAILGUARD_TENANTS": write(tmp_path / "t.yaml", "")})
    assert list(config.tenants) == [""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants: {lab: {polcy: x}}", r"tenants\.lab\.polcy"),
        ("tenants: {lab: {overrides: perhaps}}", r"tenants\.lab\.overrides"),
        ("tenants: {'two words': {}}", "two words"),
        ("tenants: {'': {}}", "tenants"),
        ("tenant: {}", "'tenant'"),
        ("[1, 2]", "dictionary"),
        ("tenants: {lab: {", "cannot read"),
        ("tenants: {lab: {policy: nowhere.yaml}}", "nowhere"),
    ],
)
def test_a_mistake_in_the_tenants_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "t.yaml", text)
    with pytest.raises(PolicyError, match=message) as caught:
        read_config({"SAILGUARD_TENANTS": path})
    assert "t.yaml" in str(caught.value) or "nowhere" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_tenants_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"SAILGUARD_TENANTS: cannot read .*t\.yaml"):
        read_config({"SAILGUARD_TENANTS": str(path)})


def test_a_default_policy_in_two_places_is_refused(tmp_path: Path) -> None:
    policy = named(tmp_path, "one")
    path = write(tmp_path / "t.yaml", f"default: {{policy: {policy}}}")
    with pytest.raises(PolicyError, match="leave one of them out"):
        read_config({"SAILGUARD_POLICY": policy, "SAILGUARD_TENANTS": path})


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_a_wrong_number_of_programs_is_named(number: str) -> None:
    with pytest.raises(GuardError, match="SAILGUARD_STEERING_PROGRAMS"):
        read_config({"SAILGUARD_STEERING_PROGRAMS": number})


def test_unknown_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="nowhere"):
        read_config({"SAILGUARD_POLICY": str(tmp_path / "nowhere.yaml")})
    with pytest.raises(BankError, match="nowhere"):
        read_config({"SAILGUARD_BANK": str(tmp_path / "nowhere")})


# ---- what requests ask for ----


@pytest.mark.parametrize("given", [None, {}, {"other": 1}])
def test_a_request_that_asks_for_nothing_is_the_default_tenants(config: Config, given: Any) -> None:
    assert config.options(given) == Options("", ())


@pytest.mark.parametrize("tenant", ["nobody", 3, None, ["lab"]])
def test_an_unknown_tenant_is_refused(config: Config, tenant: Any) -> None:
    with pytest.raises(GuardError, match="sailguard_tenant"):
        config.options({"sailguard_tenant": tenant})


def test_an_unknown_argument_of_ours_is_refused(config: Config) -> None:
    with pytest.raises(GuardError, match="'sailguard_stear' is not known"):
        config.options({"sailguard_stear": "violence=1"})


def test_steering_needs_the_tenants_leave(config: Config) -> None:
    with pytest.raises(GuardError, match="overrides: true"):
        config.options({"sailguard_steer": "violence=1"})


@pytest.mark.parametrize(
    ("item", "kind", "op", "amount"),
    [
        ("violence=-2.5", "domain", "add", -2.5),
        ("violence/gore=1", "concept", "add", 1.0),
        ("L3/10=clamp:3", "feature", "clamp", 3.0),
        ("terror=ablate", "domain", "ablate", None),
        ("violence/gore=clamp:0.5", "concept", "clamp", 0.5),
        ("L1/3=ablate", "feature", "ablate", None),
    ],
)
def test_steering_is_understood(config: Config, item: str, kind: str, op: str, amount: float | None) -> None:
    options = config.options({"sailguard_tenant": "lab", "sailguard_steer": f" {item} , politics=1"})
    assert options == Options("lab", (item, "politics=1"))
    assert config.options({"sailguard_tenant": "lab", "sailguard_steer": [item, "politics=1"]}) == options
    rule = steering_rule(config.bank, item).rule
    assert getattr(rule, kind) == item.split("=")[0]
    assert (rule.label, rule.action, rule.steer.op) == (f"request:{item}", "steer", op)
    if amount is not None:
        assert amount == (rule.steer.strength if op == "add" else rule.steer.value)


@pytest.mark.parametrize(
    "wanted",
    [
        *("violence", "violence=", "violence=much", "violence=nan", "violence=99", "violence=clamp"),
        *("violence=clamp:99", "violence=ablate:2", "nothing=1", "L1=1", "=1", "violence=1,"),
        *([["violence=1"]], 3, 1.5, True),
    ],
)
def test_what_is_no_steering_is_refused_by_name(config: Config, wanted: Any) -> None:
    with pytest.raises(GuardError, match="sailguard_steer"):
        config.options({"sailguard_tenant": "lab", "sailguard_steer": wanted})


def test_a_rule_that_would_read_the_prompt_once_more_is_refused() -> None:
    refuse_prompt_steering(make_policy(STEER, {"domain": "terror", "action": "flag", "steer": {"prompt": True}}))
    with pytest.raises(PolicyError, match=r"'away'.*'steer\.prompt'"):
        refuse_prompt_steering(make_policy({**STEER, "steer": {"prompt": True}}))


def test_rules_are_found_by_their_keys(config: Config) -> None:
    other = make_policy({**STEER, "steer": {"op": "ablate"}})
    monitors = {"": Monitor(config.bank, make_policy(STEER), CPU), "lab": Monitor(config.bank, other, CPU)}
    rules = Rules(config.bank, monitors)
    assert rules.find(("", "away")).rule.steer.op == "add"
    assert rules.find(("lab", "away")).rule.steer.op == "ablate"
    (key,) = own_rules(Options("lab", ("L1/3=clamp:2",)))
    bound = rules.find(key)
    assert (bound.rule.feature, bound.rule.steer.value, bound.columns.tolist()) == ("L1/3", 2.0, [0])
    assert rules.find(key).rule == bound.rule


def test_a_rule_that_fires_on_prompts_alone_is_found_too(config: Config) -> None:
    monitor = Monitor(config.bank, make_policy({**STEER, "scope": ["prompt"]}), CPU)
    assert Rules(config.bank, {"": monitor}).find(("", "away")).rule.label == "away"


def test_what_the_bank_does_not_hold_is_refused(config: Config) -> None:
    rules = Rules(config.bank, {"": Monitor(config.bank, make_policy(STEER), CPU)})
    (key,) = own_rules(Options("", ("L99/1=2",)))
    with pytest.raises(PolicyError, match="L99/1"):
        rules.find(key)


@pytest.mark.parametrize("item", ["L99/1=2", "violence/nothing=1"])
def test_what_the_bank_does_not_hold_is_refused_before_the_request_is_taken(config: Config, item: str) -> None:
    """In the worker it would be too late: an error there ends the engine for all."""
    with pytest.raises((GuardError, PolicyError), match=item.split("=")[0]):
        config.options({"sailguard_tenant": "lab", "sailguard_steer": item})

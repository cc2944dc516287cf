"""`/v1/about` says what the server is and what a key may do, and it is so; `/v1/stats` says what the metrics say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.bank import Bank
from guard.judge import Judge
from guard.metrics import Metrics
from guard.policy import Policy
from tests.service.edges import write_keys
from tests.service.file_engine import FileEngine, policy_text
from tests.service.test_auth import line

KEYS = {"client": "key-of-a-client", "reader": "key-of-a-reader", "admin": "key-of-an-admin"}
ALL = ("generate", "trace", "steer", "compare", "review", "audit", "mark", "events")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "keys", *(line(key, f"the-{role}", role) for role, key in KEYS.items()))


def about(client: TestClient, role: str | None = None) -> dict[str, Any]:
    headers = {} if role is None else {"Authorization": f"Bearer {KEYS[role]}"}
    response = client.get("/v1/about", headers=headers)
    assert response.status_code == 200, response.text
    return dict(response.json())


def can(found: dict[str, Any]) -> set[str]:
    assert set(found["can"]) == set(ALL)
    return {name for name, may in found["can"].items() if may}


def test_the_server_says_what_it_is(client: TestClient, engine: Any) -> None:
    found = about(client)
    bank = engine.bank
    assert (found["object"], found["model"], found["context_length"]) == ("about", engine.model_id, 64)
    assert found["domains"] == list(Judge(bank, engine.policy).domains), "scores are in this order everywhere"
    assert found["bank"]["features"] == len(bank.features)
    assert found["bank"]["content_hash"] == bank.content_hash
    assert found["bank"]["layers"] == sorted({feature.layer for feature in bank.features})
    assert set(found["bank"]["domains"]) == set(bank.heads)
    assert found["bank"]["ceiling"] == bank.pooling.ceiling
    assert all("/" in concept for concept in found["bank"]["concepts"])
    assert (found["generates"], found["proxy"], found["keys"]) == (True, False, False)
    assert (found["role"], found["key_id"]) == (None, None)
    assert found["limits"] == {"max_new_tokens": 512, "max_input_tokens": 32768}
    assert found["audit"] == {"on": False, "text": False}


def test_thresholds_are_those_that_the_guard_compares_with(client: TestClient, engine: Any) -> None:
    engine.policy = Policy.model_validate(
        {
            "rules": [
                {"domain": "violence", "threshold": {"fpr": 0.01}, "action": "block"},
                {"domain": "politics", "threshold": {"probability": 0.7}, "action": "flag", "evidence_tokens": 3},
                {"feature": engine.bank.features[0].id, "threshold": {"activation": 0.5}, "action": "flag"},
                {
                    "when": {
                        "all": [
                            {"domain": "terror", "threshold": {"probability": 0.6}},
                            {"feature": engine.bank.features[0].id, "threshold": {"activation": 0.5}},
                        ]
                    },
                    "scope": ["response"],
                    "action": "flag",
                },
            ]
        }
    )
    judge = Judge(engine.bank, engine.policy)
    rules = {rule["name"]: rule for rule in about(client)["policy"]["rules"]}
    texts = {bound.rule.label: bound for bound in (*judge.rules["prompt"].rules, *judge.rules["response"].rules)}
    streams = {bound.rule.label: bound for bound in judge.streaming_rules.rules}
    assert set(rules) == set(texts) == set(streams)
    for name, rule in rules.items():
        assert rule["evidence_tokens"] == texts[name].evidence_tokens == streams[name].evidence_tokens
        if texts[name].rule.when is None:
            assert rule["thresholds"] == {"text": texts[name].threshold, "stream": streams[name].threshold}
        else:
            assert rule["thresholds"] == {"text": None, "stream": None}
            assert rule["scope"] == ["response"]


# ---- what a key may do -------------------------------------------------------------------------------------------


def test_without_keys_all_is_open_but_what_needs_an_administrator(make_app: Callable[..., Any], tmp_path: Path) -> None:
    with TestClient(make_app(audit=tmp_path / "audit.db")) as client:
        assert can(about(client)) == {"generate", "trace", "steer", "compare", "events"}


def test_each_role_is_told_what_it_may_do(make_app: Callable[..., Any], keys: Path, tmp_path: Path, bank: Path) -> None:
    files = {"audit": tmp_path / "audit.db", "spool": tmp_path / "spool.db"}
    app = make_app(api_keys_file=keys, **files, audit_text=True, bank=bank)
    with TestClient(app) as client:
        found = {role: about(client, role) for role in KEYS}
    assert can(found["admin"]) == set(ALL)
    assert can(found["client"]) == {"generate", "trace"}
    assert can(found["reader"]) == {"events"}
    for role, one in found.items():
        assert (one["role"], one["key_id"], one["keys"]) == (role, f"the-{role}", True)
        assert one["audit"] == {"on": True, "text": True}


def test_what_it_says_is_what_the_server_does(
    make_app: Callable[..., Any], keys: Path, tmp_path: Path, bank: Path
) -> None:
    asked = {
        "trace": ("POST", "/v1/traces", {"input": "a bird"}),
        "compare": ("POST", "/v1/compare", {"texts": ["a bird"]}),
        "review": ("POST", "/admin/reviews", {"feature": "L1/1", "verdict": "accept", "reviewer": "Ada"}),
        "audit": ("GET", "/admin/audit", None),
        "mark": ("GET", "/admin/spool", None),
    }
    engine = FileEngine.start(bank, None, Metrics())
    for audit in (None, tmp_path / "audit.db"):
        with TestClient(
            make_app(engine, api_keys_file=keys, audit=audit, spool=audit and tmp_path / "spool.db", bank=bank)
        ) as client:
            for role, key in KEYS.items():
                found = about(client, role)
                for name, (method, path, body) in asked.items():
                    headers = {"Authorization": f"Bearer {key}"}
                    answer = client.request(method, path, json=body, headers=headers)
                    assert (answer.status_code == 200) is found["can"][name], (role, name, answer.text)


def test_a_server_that_only_judges_generates_and_steers_for_nobody(make_app: Callable[..., Any], bank: Path) -> None:
    with TestClient(make_app(FileEngine.start(bank, None, Metrics()), bank=bank)) as client:
        found = about(client)
    assert not found["generates"]
    assert can(found) == {"trace", "compare", "events"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_bank_that_cannot_be_written_is_not_reviewed(make_app: Callable[..., Any], keys: Path, bank: Path) -> None:
    bank.chmod(0o500)
    try:
        with TestClient(make_app(api_keys_file=keys, bank=bank)) as client:
            assert not about(client, "admin")["can"]["review"]
    finally:
        bank.chmod(0o700)


def test_a_bank_for_which_the_system_says_no_is_not_reviewed(
    make_app: Callable[..., Any], keys: Path, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with TestClient(make_app(api_keys_file=keys, bank=bank)) as client:
        assert not about(client, "admin")["can"]["review"]


# ---- numbers -----------------------------------------------------------------------------------------------------


def stats(client: TestClient) -> dict[str, Any]:
    response = client.get("/v1/stats")
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_before_the_first_request_nothing_is_counted_and_no_ratio_is_made_up(client: TestClient, engine: Any) -> None:
    found = stats(client)
    assert found["verdicts"] == {}
    assert sum(count for phase in found["requests"].values() for count in phase.values()) == 0
    assert found["tokens"] == {"observed": 0, "generated": 0}
    assert (found["coverage"], found["guard"]["mean_ms"], found["guard"]["share"]) == (None, None, None)
    assert (found["errors"], found["queued"], found["in_flight"]) == (0, 0, 1)
    assert (found["bank"], found["policy"]) == (engine.bank_version, engine.policy_version)


def test_stats_say_what_the_metrics_say(client: TestClient, engine: Any, metrics: Metrics) -> None:
    client.post("/v1/moderations", json={"input": ["calm", "violence", "politics violence"]})
    metrics.count_tokens(30, 40)
    metrics.observe_step(0.002)
    metrics.observe_step(0.004)
    metrics.count_error("block")
    metrics.count_error("allow")
    found = stats(client)
    assert found["verdicts"] == {"violence": {"block": 2}, "politics": {"block": 1}}
    assert found["requests"]["prompt"] == {"allow": 1, "flag": 0, "steer": 0, "block": 2, "error": 0}
    assert (found["tokens"], found["coverage"]) == ({"observed": 30, "generated": 40}, 0.75)
    assert found["errors"] == 2
    assert found["guard"]["steps"] == 2
    assert found["guard"]["seconds"] == pytest.approx(0.006)
    assert found["guard"]["mean_ms"] == pytest.approx(3.0)


def test_stats_of_several_processes_are_added_up(tmp_path: Path) -> None:
    other = "from guard.metrics import Metrics; m = Metrics(); m.count_tokens(1, 2); m.count_request('prompt', 'allow')"
    mine = (
        "from guard.metrics import Metrics; from service.routes.stats import _Counted; m = Metrics(); "
        "m.count_tokens(3, 4); c = _Counted(m.render()); "
        "print(c.total('tokens_observed_total'), c.total('tokens_generated_total'), "
        "c.table('requests_total', 'phase', 'result')['prompt']['allow'])"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", other], env=environment, check=True)
    done = subprocess.run([sys.executable, "-c", mine], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["4.0", "6.0", "1"]


def test_bank_and_policy_of_about_and_stats_follow_a_reload(
    make_app: Callable[..., Any], bank: Path, keys: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_text())
    app = make_app(FileEngine.start(bank, policy, Metrics()), bank=bank, policy=policy, api_keys_file=keys)
    with TestClient(app, headers={"Authorization": f"Bearer {KEYS['admin']}"}) as client:
        before = about(client, "admin")["policy"]["version"]
        policy.write_text(policy_text("other"))
        assert client.post("/admin/policy/reload").json()["result"] == "ok"
        after = about(client, "admin")["policy"]
        assert (after["name"], after["version"] != before) == ("other", True)
        assert stats(client)["policy"] == after["version"]
        assert stats(client)["bank"] == Bank.load(bank).version

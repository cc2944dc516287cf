"""What the engine tells of its requests reaches the right answers and the metrics, once, and is not kept for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from guard.engines.vllm import frontend as module
from guard.engines.vllm.config import Config, Tenant
from guard.engines.vllm.frontend import Frontend, attach, current
from guard.errors import GuardError
from guard.events import ActionName, FeatureHit, SequenceReport, Verdict
from guard.metrics import Metrics
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank
from tests.guard.generation import BLOCK

HIT = FeatureHit(id="L1/3", layer=1, explanation="made up", activation=1.0, contribution=0.5)
VERDICT = Verdict(
    request_id="a",
    phase="response",
    token_index=4,
    domain="violence",
    score=0.9,
    threshold=0.5,
    action="flag",
    rule="violence-flag",
    features=(HIT,),
    bank_version="1",
    policy_version="p+1",
)


@pytest.fixture
def config(bank_of: MakeBank) -> Config:
    return Config(bank_of(**VARIED), {"": Tenant(make_policy(BLOCK), overrides=False)}, 4)


@pytest.fixture
def frontend(config: Config) -> Frontend:
    return Frontend(config, Metrics())


@pytest.fixture
def no_frontend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prometheus_client, "REGISTRY", CollectorRegistry())
    kept, module._FRONTENDS[:] = list(module._FRONTENDS), []
    yield
    module._FRONTENDS[:] = kept


def report(request_id: str, action: ActionName = "flag", tokens: int = 5, *verdicts: Verdict) -> SequenceReport:
    return SequenceReport(
        request_id=request_id,
        action=action,
        verdicts=verdicts,
        prompt_scores={"violence": 0.1},
        response_scores={"violence": 0.8},
        tokens_generated=tokens,
        tokens_observed=tokens,
    )


def payload(found: SequenceReport, **more: Any) -> dict[str, Any]:
    told = {"action": found.action, "report": found.to_dict(), "failed": False, "refusal": "", "policy": "p+1"}
    return {**told, "step_seconds": [], "errors": {}, **more}


def value(frontend: Frontend, series: str, **labels: str) -> float:
    found = frontend.metrics.registry.get_sample_value(series, labels)
    return 0.0 if found is None else found


def test_what_is_told_of_several_requests_adds_up(frontend: Frontend) -> None:
    frontend.arrived("a", payload(report("a", "flag", 5, VERDICT, VERDICT), step_seconds=[0.5, 0.25]))
    frontend.arrived("b", payload(report("b", "block", 3), step_seconds=[1.0], errors={"block": 2, "flag": 1}))
    frontend.arrived("c", payload(report("c", "allow", 0), failed=True))
    assert value(frontend, "sailguard_step_overhead_seconds_count") == 3
    assert value(frontend, "sailguard_step_overhead_seconds_sum") == 1.75
    assert value(frontend, "sailguard_errors_total", on_error="block") == 2
    assert value(frontend, "sailguard_errors_total", on_error="flag") == 1
    assert value(frontend, "sailguard_verdicts_total", domain="violence", action="flag") == 2
    assert value(frontend, "sailguard_tokens_observed_total") == 8
    assert value(frontend, "sailguard_tokens_generated_total") == 8
    assert value(frontend, "sailguard_requests_total", phase="response", result="flag") == 1
    assert value(frontend, "sailguard_requests_total", phase="response", result="block") == 1
    assert value(frontend, "sailguard_requests_total", phase="prompt", result="error") == 1


def test_verdicts_that_ride_ahead_of_the_report_are_not_counted_twice(frontend: Frontend) -> None:
    frontend.arrived("a", {"verdicts": [VERDICT.to_dict()]})
    assert value(frontend, "sailguard_verdicts_total", domain="violence", action="flag") == 0
    frontend.arrived("a", payload(report("a", "flag", 5, VERDICT)))
    assert value(frontend, "sailguard_verdicts_total", domain="violence", action="flag") == 1


def test_bank_and_policy_are_published(frontend: Frontend, config: Config) -> None:
    policy = config.tenants[""].policy
    labels = {"name": "test", "version": policy.version, "on_error": "block"}
    assert value(frontend, "sailguard_policy_info", **labels) == 1
    assert b'sailguard_bank_info{content_hash="' in frontend.metrics.render()


def test_a_report_comes_through_whole(frontend: Frontend) -> None:
    told = report("a", "block", 5, VERDICT)
    frontend.arrived("a", payload(told, refusal="REFUSED"))
    found = frontend.finished("a", "client", 0)
    assert (found.report, found.refusal, found.policy) == (told, "REFUSED", "p+1")
    assert frontend.fetch("client") == {0: found}
    assert frontend.fetch("client") == {}


def test_answers_to_one_request_are_kept_by_their_index(frontend: Frontend) -> None:
    for index in (2, 0, 1):
        frontend.arrived(f"{index}_x", payload(report(f"{index}_x")))
        frontend.finished(f"{index}_x", "x", index)
    frontend.arrived("y", payload(report("y")))
    frontend.finished("y", "y", 0)
    assert {index: found.report.request_id for index, found in frontend.fetch("x").items()} == {
        2: "2_x",
        0: "0_x",
        1: "1_x",
    }
    assert frontend.fetch("y")[0].report.request_id == "y"


def test_answers_to_several_prompts_of_one_request_come_in_their_order(frontend: Frontend) -> None:
    for prompt in (1, 0, 2):
        for index in (1, 0):
            name = f"p{prompt}i{index}"
            frontend.arrived(name, payload(report(name)))
            frontend.finished(name, f"x-{prompt}", index)
    assert [found.report.request_id for found in frontend.fetch("x").values()] == [
        f"p{prompt}i{index}" for prompt in range(3) for index in range(2)
    ]
    assert list(frontend.fetch("x")) == []
    assert frontend._kept == {}


def test_of_an_answer_whose_report_has_not_come_it_is_said_what_is_known(frontend: Frontend, config: Config) -> None:
    frontend.arrived("a", {"verdicts": [VERDICT.to_dict()]})
    second = replace(VERDICT, action="steer", rule="other")
    frontend.arrived("a", {"verdicts": [VERDICT.to_dict(), second.to_dict()]})
    found = frontend.finished("a", "a", 0)
    assert (found.report.action, found.report.verdicts, found.policy) == ("steer", (VERDICT, second), "p+1")
    nothing = frontend.finished("b", "b", 0)
    assert (nothing.report.action, nothing.report.verdicts, nothing.refusal) == ("allow", (), "")
    assert nothing.policy == config.tenants[""].policy.version


def test_what_the_engine_is_done_with_is_forgotten_but_kept_for_the_response(frontend: Frontend) -> None:
    frontend.arrived("a", {"verdicts": [VERDICT.to_dict()]})
    frontend.arrived("a", payload(report("a", "flag", 5, VERDICT)))
    frontend.finished("a", "client", 0)
    frontend.forget(["a", "never seen"])
    assert (frontend._found, frontend._verdicts) == ({}, {})
    assert frontend.fetch("client")[0].report.request_id == "a"


def test_responses_that_nobody_fetches_do_not_fill_the_memory(
    frontend: Frontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT", 3)
    for n in range(10):
        frontend.finished(f"r{n}", f"c{n}", 0)
    assert list(frontend._kept) == ["c7", "c8", "c9"]
    assert frontend.fetch("c0") == {}


def test_a_process_without_a_guarded_engine_says_so(no_frontend: None) -> None:
    with pytest.raises(GuardError, match="no engine of this process"):
        current()


def test_the_metrics_go_on_when_a_process_makes_another_engine(no_frontend: None, config: Config) -> None:
    first = attach(config)
    first.arrived("a", payload(report("a")))
    second = attach(config)
    assert current() is second is not first
    second.arrived("b", payload(report("b")))
    assert value(second, "sailguard_tokens_observed_total") == 10
    assert b"sailguard_tokens_observed_total 10.0" in prometheus_client.generate_latest(prometheus_client.REGISTRY)

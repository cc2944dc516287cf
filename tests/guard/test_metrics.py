"""The metric names, labels and buckets that dashboards rely on."""

from __future__ import annotations

import threading

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from guard.events import Verdict
from guard.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def verdict(domain: str = "violence", action: str = "block") -> Verdict:
    return Verdict(
        request_id="r-confidential",
        phase="response",
        token_index=1,
        domain=domain,
        score=0.9,
        threshold=0.5,
        action=action,  # type: ignore[arg-type]
        rule="rule",
        features=(),
        bank_version="1",
        policy_version="2",
    )


def exercise(metrics: Metrics) -> None:
    metrics.count_request("prompt", "allow")
    metrics.count_verdict(verdict())
    metrics.observe_scores({"violence": 0.9, "terror": 0.1})
    metrics.observe_step(0.0007)
    metrics.count_tokens(3, 3)
    metrics.count_error("block")
    metrics.set_bank(name="b", version="1", model="m", content_hash="abc")
    metrics.set_policy(name="p", version="2", on_error="block")
    metrics.set_queue_depth(2)
    metrics.observe_request(0.2, endpoint="chat", status=200)


def test_page_parses_and_holds_every_series(metrics: Metrics) -> None:
    exercise(metrics)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = {sample.name: set(sample.labels) for family in families.values() for sample in family.samples}
    expected = {
        "sailguard_requests_total": {"phase", "result"},
        "sailguard_verdicts_total": {"domain", "action"},
        "sailguard_domain_score_bucket": {"domain", "le"},
        "sailguard_step_overhead_seconds_bucket": {"le"},
        "sailguard_tokens_observed_total": set(),
        "sailguard_tokens_generated_total": set(),
        "sailguard_errors_total": {"on_error"},
        "sailguard_bank_info": {"name", "version", "model", "content_hash"},
        "sailguard_policy_info": {"name", "version", "on_error"},
        "sailguard_queue_depth": set(),
        "sailguard_request_seconds_bucket": {"endpoint", "status", "le"},
    }
    assert {name: samples[name] for name in expected} == expected
    assert all(name.startswith("sailguard_") and ":" not in name for name in families)


def test_no_label_carries_a_request(metrics: Metrics) -> None:
    exercise(metrics)
    assert b"confidential" not in metrics.render()


def test_buckets_span_a_step_and_a_request(metrics: Metrics) -> None:
    exercise(metrics)
    edges: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.endswith("_bucket") and sample.labels["le"] != "+Inf":
                edges.setdefault(family.name, []).append(float(sample.labels["le"]))
    step, request = edges["sailguard_step_overhead_seconds"], edges["sailguard_request_seconds"]
    assert (min(step), max(step)) == (0.0001, 0.1)
    assert (min(request), max(request)) == (0.001, 30.0)


def test_error_and_request_series_exist_before_the_first_event(metrics: Metrics) -> None:
    value = metrics.registry.get_sample_value
    for on_error in ("block", "flag", "allow"):
        assert value("sailguard_errors_total", {"on_error": on_error}) == 0.0
    assert value("sailguard_requests_total", {"phase": "response", "result": "block"}) == 0.0


def test_info_holds_one_version_at_a_time(metrics: Metrics) -> None:
    metrics.set_policy(name="p", version="1")
    metrics.set_policy(name="p", version="2")
    page = metrics.render().decode()
    assert 'version="2"' in page
    assert 'version="1"' not in page


def test_each_metrics_object_has_series_of_its_own(metrics: Metrics) -> None:
    other = Metrics()
    metrics.count_error("flag")
    assert other.registry.get_sample_value("sailguard_errors_total", {"on_error": "flag"}) == 0.0


def test_given_registry_takes_the_series_and_refuses_them_twice() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    assert registry.get_sample_value("sailguard_tokens_observed_total") == 0.0
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(registry)


def test_counts_from_many_threads_are_exact(metrics: Metrics) -> None:
    def count() -> None:
        for _ in range(500):
            metrics.count_tokens(1, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.registry.get_sample_value("sailguard_tokens_observed_total") == 2000.0

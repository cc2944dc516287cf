"""The metric names, labels and buckets that dashboards rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from guard.errors import GuardError
from guard.events import Verdict
from guard.metrics import FEATURE_CAP, Metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(features=["L1/1"])


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
    metrics.queued(2)
    metrics.observe_request(0.2, endpoint="chat", status=200)
    metrics.observe_feature("L1/1", 0.7)
    metrics.observe_batch(3)
    metrics.set_ready(True)
    metrics.in_flight(1)
    metrics.count_refusal("queue")
    metrics.count_audit_entry()
    metrics.count_audit_error("block")
    metrics.count_reload("bank", "refused")
    metrics.count_spool_item("sampled")
    metrics.count_spool_drop("full")
    metrics.set_drift("violence", flag=1.0, firing=1.1, psi=0.02)


def test_page_parses_and_holds_every_series(metrics: Metrics) -> None:
    exercise(metrics)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = {sample.name: set(sample.labels) for family in families.values() for sample in family.samples}
    expected = {
        "sailguard_requests_total": {"phase", "result"},
        "sailguard_verdicts_total": {"domain", "action"},
        "sailguard_domain_score_bucket": {"domain", "le"},
        "sailguard_step_overhead_seconds_bucket": {"le"},
        "sailguard_pass_seconds_total": set(),
        "sailguard_tokens_observed_total": set(),
        "sailguard_tokens_generated_total": set(),
        "sailguard_errors_total": {"on_error"},
        "sailguard_bank_info": {"name", "version", "model", "content_hash"},
        "sailguard_spool_items_total": {"why"},
        "sailguard_spool_dropped_total": {"reason"},
        "sailguard_drift_flag_ratio": {"domain"},
        "sailguard_drift_firing_ratio": {"domain"},
        "sailguard_drift_activation_psi": {"domain"},
        "sailguard_policy_info": {"name", "version", "on_error"},
        "sailguard_queue_depth": set(),
        "sailguard_request_seconds_bucket": {"endpoint", "status", "le"},
        "sailguard_feature_activation_bucket": {"feature", "le"},
        "sailguard_feature_drops_total": set(),
        "sailguard_batch_texts_bucket": {"le"},
        "sailguard_ready": set(),
        "sailguard_requests_in_flight": set(),
        "sailguard_refused_total": {"reason"},
        "sailguard_audit_entries_total": set(),
        "sailguard_audit_errors_total": {"on_error"},
        "sailguard_reloads_total": {"what", "result"},
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
        assert value("sailguard_audit_errors_total", {"on_error": on_error}) == 0.0
    assert value("sailguard_requests_total", {"phase": "response", "result": "block"}) == 0.0
    for reason in ("queue", "rate", "concurrency", "timeout", "not_ready", "auth", "host", "size"):
        assert value("sailguard_refused_total", {"reason": reason}) == 0.0
    for what in ("bank", "policy"):
        assert [value("sailguard_reloads_total", {"what": what, "result": result}) for result in ("ok", "refused")] == [
            0.0,
            0.0,
        ]
    assert value("sailguard_feature_activation_count", {"feature": "L1/1"}) == 0.0
    assert value("sailguard_ready") == value("sailguard_requests_in_flight") == 0.0


def test_info_holds_one_version_at_a_time(metrics: Metrics) -> None:
    metrics.set_policy(name="p", version="1")
    metrics.set_policy(name="p", version="2")
    page = metrics.render().decode()
    assert 'version="2"' in page
    assert 'version="1"' not in page
    labels = {"name": "p", "version": "2", "on_error": ""}
    assert metrics.registry.get_sample_value("sailguard_policy_info", labels) == 1.0


def test_publishing_what_is_in_use_already_keeps_it(metrics: Metrics) -> None:
    for _ in range(2):
        metrics.set_bank(name="b", version="1", model="m", content_hash="abc")
    labels = {"name": "b", "version": "1", "model": "m", "content_hash": "abc"}
    assert metrics.registry.get_sample_value("sailguard_bank_info", labels) == 1.0


def test_only_features_that_were_asked_for_are_shown_and_only_where_they_fire(metrics: Metrics) -> None:
    for activation in (0.0, -1.0, 0.7):
        metrics.observe_feature("L1/1", activation)
        metrics.observe_feature("L1/2", activation)
    assert metrics.registry.get_sample_value("sailguard_feature_activation_count", {"feature": "L1/1"}) == 1.0
    assert metrics.registry.get_sample_value("sailguard_feature_activation_sum", {"feature": "L1/1"}) == 0.7
    assert b"L1/2" not in metrics.render()


def test_features_beyond_the_cap_are_dropped_and_counted() -> None:
    wanted = [f"L1/{index}" for index in range(FEATURE_CAP + 3)]
    metrics = Metrics(features=[*wanted, wanted[0]])
    assert metrics.features == tuple(wanted[:FEATURE_CAP])
    assert metrics.registry.get_sample_value("sailguard_feature_drops_total") == 3.0
    metrics.observe_feature(wanted[-1], 1.0)
    assert wanted[-1].encode() not in metrics.render()
    assert Metrics(features=wanted[:FEATURE_CAP]).registry.get_sample_value("sailguard_feature_drops_total") == 0.0


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


PROCESSES = """
    import sys
    from guard.metrics import Metrics

    metrics = Metrics(features=["L1/1"])

    def tell() -> None:
        print(metrics.render().decode(), end="\\0", flush=True)

    for line in sys.stdin:
        exec(compile(line, "step", "exec"))
        print("done", end="\\0", flush=True)
"""


class Process:
    """A process of its own with a `Metrics`, which does what it is told, one line after the other."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESSES)],
            cwd=ROOT,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def do(self, line: str) -> str:
        """Run one line and return what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        said = ""
        while not said.endswith("done\0"):
            letter = self._process.stdout.read(1)
            assert letter, "the process ended"
            said += letter
        return said.removesuffix("done\0").removesuffix("\0")

    def series(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """What this process's page shows."""
        families = text_string_to_metric_families(self.do("tell()"))
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def end(self) -> None:
        """Let it end by itself."""
        self._process.communicate(timeout=20)


def test_processes_that_share_a_folder_show_one_page(tmp_path: Path) -> None:
    first, second = Process(tmp_path), Process(tmp_path)
    try:
        for process in (first, second):
            process.do("metrics.count_refusal('queue'); metrics.observe_batch(4); metrics.observe_feature('L1/1', 0.5)")
            process.do("metrics.queued(3); metrics.in_flight(2); metrics.set_ready(True)")
            process.do("metrics.set_policy(name='p', version='1', on_error='block')")
        second.do("metrics.set_policy(name='p', version='2', on_error='block')")
        second.do("metrics.set_ready(False)")
        series = first.series()
        assert series == second.series()
        assert series["sailguard_refused_total", (("reason", "queue"),)] == 2.0
        assert series["sailguard_batch_texts_count", ()] == 2.0
        assert series["sailguard_feature_activation_count", (("feature", "L1/1"),)] == 2.0
        assert series["sailguard_queue_depth", ()] == 6.0
        assert series["sailguard_requests_in_flight", ()] == 4.0
        assert series["sailguard_ready", ()] == 0.0  # one process that cannot judge is one too many
        versions = {version: (("name", "p"), ("on_error", "block"), ("version", version)) for version in "12"}
        assert [series["sailguard_policy_info", versions[version]] for version in "12"] == [1.0, 1.0]

        first.do("metrics.set_policy(name='p', version='2', on_error='block')")
        series = first.series()
        assert [series["sailguard_policy_info", versions[version]] for version in "12"] == [0.0, 1.0]

        second.end()
        multiprocess.mark_process_dead(second.pid, str(tmp_path))  # type: ignore[no-untyped-call]
        series = first.series()
        assert series["sailguard_queue_depth", ()] == 3.0
        assert series["sailguard_ready", ()] == 1.0
        assert series["sailguard_refused_total", (("reason", "queue"),)] == 2.0
    finally:
        first.end()
        second.end()


def test_a_folder_that_is_named_too_late_is_refused(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(GuardError, match="before the process starts"):
        metrics.render()

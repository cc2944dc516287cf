"""A real Prometheus scrapes running servers: every panel, recorded ratio and alert finds its data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.events import Verdict
from guard.metrics import FEATURE_CAP, Metrics
from tests.deploy.prometheus import Exporter, Prometheus, free_port, history_of, running
from tests.deploy.queries import Query, annotation_queries, dashboard, panel_queries, rule_queries, rules

pytestmark = [pytest.mark.prometheus, pytest.mark.slow]

HOUR, DAY = 3600.0, 86400.0
STEADY, SILENT = "L15/7", "L15/8"
FEATURES = [STEADY, SILENT, *(f"L15/{index}" for index in range(1000, 1000 + FEATURE_CAP))]


class Troubled:
    """Two replicas that differ in all they should agree on, and that show everything an alert looks for."""

    def __init__(self) -> None:
        self.first, self.second = Metrics(features=FEATURES), Metrics(features=FEATURES)
        for version, metrics in enumerate((self.first, self.second)):
            metrics.set_bank(name="shipped", version=str(version), model="m", content_hash="abc")
            metrics.set_policy(name="balanced", version=str(version), on_error="block")
            metrics.queued(20)
            metrics.in_flight(21)
            metrics.set_behind("bank", True)
        self.first.set_ready(True)
        self.feed()

    def feed(self) -> None:
        """What happens in a fraction of a second."""
        for metrics in (self.first, self.second):
            for _ in range(300):  # nearly all prompts have a consequence, and no response has
                metrics.count_request("prompt", "flag")
                metrics.count_request("response", "allow")
            for _ in range(30):
                metrics.count_verdict(VERDICT)
                metrics.observe_scores({"violence": 0.9})
                metrics.observe_feature(STEADY, 2.0)
                metrics.observe_step(0.02)
                metrics.observe_pass(1.0)
                metrics.observe_batch(4)
                metrics.observe_request(2.0, endpoint="moderations", status=200)
                metrics.observe_request(2.0, endpoint="moderations", status=500)
                metrics.count_refusal("queue")
            metrics.count_tokens(90, 100)
            for on_error in ("block", "flag", "allow"):
                for _ in range(5):
                    metrics.count_error(on_error)
                    metrics.count_audit_error(on_error)
            metrics.count_audit_entry()
            metrics.count_spool_item("sampled")
            metrics.count_spool_drop("full")
            metrics.count_shadow_text("judged")
            metrics.count_shadow_disagreement("violence", "only_current")
            metrics.set_drift("violence", flag=8.0, firing=3.0, psi=0.5)
            for result in ("judged", "skipped", "error"):
                metrics.count_shadow_text(result)
            metrics.count_shadow_disagreement("violence", "only_current")
            for what in ("bank", "policy"):
                metrics.count_reload(what, "ok")
                metrics.count_reload(what, "refused")


VERDICT = Verdict(
    request_id="r",
    phase="response",
    token_index=1,
    domain="violence",
    score=0.9,
    threshold=0.5,
    action="flag",
    rule="rule",
    features=(),
    bank_version="1",
    policy_version="2",
)


def a_quiet_week(instance: str) -> str:
    """What Prometheus remembers of the days before: other rates, other scores, and a feature that fell silent."""
    now = time.time()
    means = {
        'sailguard:flagged:ratio_rate1h{job="sailguard",phase="prompt"}': 0.02,
        'sailguard:flagged:ratio_rate1h{job="sailguard",phase="response"}': 0.3,
        'sailguard:domain_score:mean1h{job="sailguard",domain="violence"}': 0.1,
        f'sailguard:feature_activation:mean1h{{job="sailguard",feature="{STEADY}"}}': 0.5,
    }
    samples = [(series, value, now - hours * HOUR) for series, value in means.items() for hours in range(6 * 24, 3, -1)]
    fired = f'sailguard_feature_activation_count{{job="sailguard",instance="{instance}",feature="{SILENT}"}}'
    return history_of([*samples, *((fired, 7.0, now - DAY + minute * 60.0) for minute in range(-10, 11))])


@pytest.fixture(scope="module")
def troubled() -> Troubled:
    return Troubled()


@pytest.fixture(scope="module")
def prometheus(troubled: Troubled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with Exporter(troubled.first) as first, Exporter(troubled.second) as second:
        targets = [first, second, f"127.0.0.1:{free_port()}"]
        with running(folder, targets, history=a_quiet_week(first)) as server:
            yield server


def assert_data(prometheus: Prometheus, troubled: Troubled, queries: list[Query]) -> None:
    assert len({query.name for query in queries}) == len(queries)
    found = prometheus.wait_for({query.name: query.expression for query in queries}, troubled.feed)
    for query in queries:
        for series in found[query.name]:
            assert query.labels <= series["metric"].keys(), f"{query.name}: its legend names a label that is not there"


def test_every_panel_shows_data(prometheus: Prometheus, troubled: Troubled) -> None:
    assert_data(prometheus, troubled, [*panel_queries(), *annotation_queries()])


def test_every_recorded_ratio_is_recorded(prometheus: Prometheus, troubled: Troubled) -> None:
    assert_data(prometheus, troubled, list(rule_queries("record")))
    names = [rule["record"] for rule in rules("record")]
    prometheus.wait_for({name: name for name in names}, troubled.feed)


def test_every_alert_fires_in_what_it_is_about_and_says_so_in_words(prometheus: Prometheus, troubled: Troubled) -> None:
    assert_data(prometheus, troubled, list(rule_queries("alert")))
    names = [rule["alert"] for rule in rules("alert")]
    prometheus.wait_for({name: f'ALERTS{{alertname="{name}"}}' for name in names}, troubled.feed)
    for alert in prometheus.get("alerts")["alerts"]:
        said = " ".join(alert["annotations"].values())
        assert "<no value>" not in said
        assert "error expanding" not in said
    groups = prometheus.get("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def test_the_dashboards_variables_find_their_values(prometheus: Prometheus, troubled: Troubled) -> None:
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] != "query":
            continue
        selector, _, label = variable["definition"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
        (found,) = prometheus.wait_for({"it": selector.replace("$job", ".+")}, troubled.feed).values()
        assert all(series["metric"][label] for series in found)


def test_the_moments_at_which_series_began_are_not_stored(prometheus: Prometheus, troubled: Troubled) -> None:
    prometheus.wait_for({"it": "sailguard_requests_total"}, troubled.feed)
    assert b"_created" in troubled.first.render()
    assert prometheus.get("series", **{"match[]": '{__name__=~"sailguard_.+_created"}'}) == []

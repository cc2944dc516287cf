"""The alert rules: valid, tested in both directions, and each with a section that says what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.metrics import Metrics
from tests.deploy.prometheus import DEPLOY, tool
from tests.deploy.queries import all_queries, rules

ROOT = DEPLOY.parent
SEVERITIES = {"critical", "warning"}
ALERTS = rules("alert")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_prometheus_accepts_the_configuration_and_the_rules() -> None:
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", DEPLOY / "alerts.yml")


@pytest.mark.prometheus
def test_every_alert_fires_when_it_should_and_stays_silent_when_it_should() -> None:
    promtool("test", "rules", DEPLOY / "alerts_test.yml")


def test_every_alert_is_tested_in_both_directions() -> None:
    cases = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    names = {alert["alert"] for alert in ALERTS}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == names


@pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
def test_an_alert_says_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"Sailguard[A-Z]\w+", alert["alert"])
    assert alert["labels"]["severity"] in SEVERITIES
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    page, anchor = alert["annotations"]["runbook"].split("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor == alert["alert"].lower()
    assert alert["alert"] in headings


def test_the_page_describes_no_alert_that_is_gone() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^#+ (Sailguard\w+)$", page, re.MULTILINE)) == sorted(a["alert"] for a in ALERTS)


def test_recorded_names_have_colons_and_alerts_do_not_read_what_nobody_records() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    assert all(re.fullmatch(r"sailguard:\w+(:\w+)?", name) for name in recorded)
    read = {name for query in all_queries() for name in re.findall(r"sailguard:[\w:]+", query.expression)}
    assert read <= recorded
    assert recorded <= read, "something is recorded that nobody reads"


def test_queries_read_metrics_that_exist_and_every_metric_is_read() -> None:
    page = Metrics(features=["L1/1"]).registry.collect()
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    families = {family.name: {family.name + suffix for suffix in suffixes[family.type]} for family in page}
    known = set().union(*families.values())
    read = {name for query in all_queries() for name in re.findall(r"\bsailguard_\w+", query.expression)}
    assert read - known == set()
    assert {name for name, series in families.items() if not series & read} == set()


def test_the_page_lists_every_metric_with_its_labels() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    listed = {
        name: cells[2].replace("`", "").strip()
        for cells in (line.split("|") for line in page.splitlines() if line.startswith("| `sailguard_"))
        for name in re.findall(r"`(\w+)`", cells[1])
    }
    metrics = Metrics(features=["L1/1"])
    names = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    assert listed.keys() == names
    for family in metrics.registry.collect():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        shown = listed[family.name + ("_total" if family.type == "counter" else "")]
        assert labels <= set(shown.split(", ")), family.name

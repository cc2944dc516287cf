"""The Grafana dashboard: what Grafana needs to load it, and what a reader needs to trust it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import DEPLOY
from tests.deploy.queries import VARIABLES, all_queries, dashboard, panels

BUILT_IN = {"__rate_interval", "__range"}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in every)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))


def test_every_query_goes_to_the_data_source_that_is_chosen() -> None:
    loaded = dashboard()
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in loaded["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels():
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
    for holder in [*loaded["annotations"]["list"], *(variables[name] for name in ("job", "instance", "domain"))]:
        assert holder["datasource"] == chosen


def test_queries_use_the_variables_that_exist_and_each_is_used() -> None:
    loaded = dashboard()
    names = {variable["name"] for variable in loaded["templating"]["list"]} - {"datasource"}
    text = " ".join(
        [target["expr"] for panel in panels() for target in panel["targets"]]
        + [panel["title"] for panel in panels()]
        + [annotation["expr"] for annotation in loaded["annotations"]["list"]]
    )
    used = set(re.findall(r"\$(\w+)", text))
    assert used == names | BUILT_IN == set(VARIABLES)
    assert not any("$" in query.expression for query in all_queries())


@pytest.mark.parametrize("panel", panels(), ids=[panel["title"] for panel in panels()])
def test_a_panel_can_be_limited_to_some_servers(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        if "ALERTS" in target["expr"]:
            continue
        selectors = re.findall(r"sailguard[\w:]+({[^}]*})?", target["expr"])
        assert selectors
        assert all('job=~"$job"' in selector for selector in selectors), target["expr"]


def test_what_is_provisioned_fits_together() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/sailguard.yml").read_text())["providers"]
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    assert source["url"] == "$PROMETHEUS_URL"
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"] if volume.startswith("./"))
    assert provider["options"]["path"] in mounted.values()
    assert services["grafana"]["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"

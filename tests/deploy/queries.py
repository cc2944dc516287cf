"""Every query of the dashboard and of the rules, ready to be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.deploy.prometheus import DEPLOY

VARIABLES = {"job": ".+", "instance": ".+", "domain": ".+", "__rate_interval": "10s", "__range": "5m"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One expression and where it stands."""

    name: str
    expression: str
    legend: str = ""

    @property
    def labels(self) -> set[str]:
        """The labels that the legend speaks of."""
        return set(re.findall(r"{{(\w+)}}", self.legend))


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/sailguard.json").read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    """All panels that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules of a kind, `alert` or `record`, over all groups."""
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def substituted(expression: str) -> str:
    """`expression` with the dashboard's variables filled in. One that is not known stays and is refused later."""
    for name in sorted(VARIABLES, key=len, reverse=True):
        expression = expression.replace(f"${name}", VARIABLES[name])
    return expression


def panel_queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            name = f"panel {panel['title']!r} {target['refId']}"
            yield Query(name=name, expression=substituted(target["expr"]), legend=target["legendFormat"])


def annotation_queries() -> Iterator[Query]:
    for annotation in dashboard()["annotations"]["list"]:
        yield Query(name=f"annotation {annotation['name']!r}", expression=substituted(annotation["expr"]))


def rule_queries(kind: str) -> Iterator[Query]:
    for rule in rules(kind):
        yield Query(name=f"{kind} {rule[kind]}", expression=rule["expr"])


def all_queries() -> list[Query]:
    return [*panel_queries(), *annotation_queries(), *rule_queries("record"), *rule_queries("alert")]

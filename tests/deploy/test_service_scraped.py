"""A real Prometheus scrapes the service itself."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from guard.metrics import Metrics
from service.app import create_app
from service.settings import Settings
from tests.deploy.prometheus import running
from tests.service.conftest import FakeEngine, ServerThread

pytestmark = [pytest.mark.prometheus, pytest.mark.slow]


def post(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 200
        response.read()


def test_a_running_service_is_scraped_under_the_names_that_the_rules_use(tmp_path: Path) -> None:
    settings = Settings(port=0)
    app = create_app(FakeEngine(Metrics()), settings)
    with ServerThread(app, settings) as url, running(tmp_path, [url.removeprefix("http://")]) as prometheus:
        wanted = {
            "up": 'up{job="sailguard"} == 1',
            "requests": 'sum(rate(sailguard_request_seconds_count{endpoint="moderations"}[10s])) > 0',
            "latency": "sailguard:request_seconds:p99_5m",
            "queue": "sailguard_queue_depth",
        }
        prometheus.wait_for(wanted, lambda: post(f"{url}/v1/moderations", {"input": "a small bird"}))
        assert prometheus.query("sailguard:tokens_unobserved > 0") == []

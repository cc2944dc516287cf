"""Liveness, readiness, the list of models and the metrics page."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from feature_bank.errors import ModelError

URL = "/v1/chat/completions"


def wait_for(client: TestClient, path: str, status: int) -> Any:
    deadline = time.monotonic() + 10
    while (response := client.get(path)).status_code != status:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.01)
    return response


def test_server_lives_at_once_and_is_ready_once_the_guard_is_attached(
    make_app: Callable[..., Any], engine: Any, chat: Callable[..., Any]
) -> None:
    attach = threading.Event()

    def load(_: object) -> Any:
        assert attach.wait(10)
        return engine

    with TestClient(make_app(load)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        for response in (client.get("/readyz"), client.post(URL, json=chat()), client.get("/v1/models")):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
            assert "loading" in response.json()["error"]["message"]
            assert "Retry-After" in response.headers
        attach.set()
        ready = wait_for(client, "/readyz", 200).json()
        assert ready == {
            "status": "ready",
            "model": "tiny-guarded",
            "bank": "bank-1",
            "policy": "policy-1",
        }
        assert client.post(URL, json=chat()).status_code == 200


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelError("folder '/models/x' lacks config.json"), "lacks config.json"),
        (ZeroDivisionError("x"), "ZeroDiv"),
    ],
)
def test_failed_start_keeps_the_server_unready_and_says_why(
    make_app: Callable[..., Any], error: Exception, told: str
) -> None:
    def load(_: object) -> Any:
        raise error

    with TestClient(make_app(load)) as client:
        deadline = time.monotonic() + 10
        while told not in client.get("/readyz").json()["error"]["message"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_engine_that_the_server_made_is_closed_by_it_and_another_is_not(
    make_app: Callable[..., Any], engine: Any
) -> None:
    closed: list[str] = []
    engine.close = lambda: closed.append(threading.current_thread().name)
    with TestClient(make_app(engine)):
        pass
    assert closed == []
    with TestClient(make_app(lambda _: engine)) as client:
        wait_for(client, "/readyz", 200)
    assert len(closed) == 1
    assert closed[0].startswith("sailguard-model")


def test_models_are_the_served_one_and_the_alias(client: TestClient) -> None:
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["tiny-guarded", "sailguard"]
    assert client.get("/v1/models/sailguard").json()["object"] == "model"
    assert client.get("/v1/models/org/other").json()["error"]["code"] == "model_not_found"


def test_metrics_page_parses_and_counts_requests_by_endpoint_and_status(
    client: TestClient, chat: Callable[..., Any]
) -> None:
    client.post(URL, json=chat())
    client.post(URL, json=chat(stream=True))
    client.post(URL, json={})
    client.post("/v1/moderations", json={"input": "x"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    counts = {
        (sample.labels["endpoint"], sample.labels["status"]): sample.value
        for sample in families["sailguard_request_seconds"].samples
        if sample.name.endswith("_count")
    }
    assert counts == {("chat", "200"): 2.0, ("chat", "400"): 1.0, ("moderations", "200"): 1.0}
    assert "sailguard_queue_depth" in families


def test_two_applications_share_no_series(make_app: Callable[..., Any], engine: Any, chat: Callable[..., Any]) -> None:
    from guard.metrics import Metrics
    from service.app import create_app
    from service.settings import Settings

    first = make_app()
    second = create_app(type(engine)(Metrics()), Settings())
    with TestClient(first) as client:
        client.post(URL, json=chat())
    with TestClient(second) as client:
        assert 'endpoint="chat"' not in client.get("/metrics").text


def test_api_description_names_the_request_bodies(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    content = schema["paths"][URL]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"]["$ref"].endswith("ChatRequest")

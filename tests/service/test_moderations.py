"""The moderation endpoint: OpenAI's categories where ours map, everything in our own block."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.metrics import Metrics

URL = "/v1/moderations"


def test_string_and_list_give_one_result_each_in_order(client: TestClient) -> None:
    single = client.post(URL, json={"input": "violence"}).json()
    several = client.post(URL, json={"input": ["calm", "violence", ""]}).json()
    assert len(single["results"]) == 1
    assert [result["flagged"] for result in several["results"]] == [False, True, False]
    assert several["results"][1] == single["results"][0]
    assert several["model"] == "tiny-guarded"


def test_more_texts_than_one_batch_keep_their_order(client: TestClient) -> None:
    texts = ["violence" if number % 3 == 0 else "calm" for number in range(50)]
    results = client.post(URL, json={"input": texts}).json()["results"]
    assert [result["flagged"] for result in results] == [text == "violence" for text in texts]


@pytest.mark.parametrize(
    ("domain", "category"),
    [("pornography", "sexual"), ("violence", "violence"), ("terror", None), ("politics", None)],
)
def test_domains_map_only_to_categories_of_the_same_meaning(
    client: TestClient, domain: str, category: str | None
) -> None:
    (result,) = client.post(URL, json={"input": domain}).json()["results"]
    assert result["flagged"] is True
    raised = [name for name, raised in result["categories"].items() if raised]
    assert raised == ([category] if category else [])
    assert all((score > 0.5) == (name == category) for name, score in result["category_scores"].items())
    own = result["sailguard"][domain]
    assert (own["flagged"], own["action"], own["score"]) == (True, "block", 0.99)
    assert own["features"][0]["id"] == "L15/7"
    others = [block for name, block in result["sailguard"].items() if name != domain]
    assert all((block["flagged"], block["action"]) == (False, "allow") for block in others)
    assert result["tokens"] == 1
    assert result["truncated"] is False


@pytest.mark.parametrize(
    "value", [None, 1, [], [1], [["nested"]], [{"type": "text", "text": "x"}], {"text": "x"}, ["x"] * 1000]
)
def test_other_inputs_are_refused(client: TestClient, value: Any) -> None:
    response = client.post(URL, json={"input": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("input")


@pytest.mark.parametrize("text", ["", "\ud83d", "\udc00 tail", "\x00"])
def test_odd_text_is_scored(client: TestClient, text: str) -> None:
    response = client.post(URL, content=json.dumps({"input": text}), headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert response.json()["results"][0]["flagged"] is False


def test_model_may_be_left_out_or_named(client: TestClient) -> None:
    for model in ("tiny-guarded", "sailguard", None):
        assert client.post(URL, json={"input": "x", "model": model}).status_code == 200
    assert client.post(URL, json={"input": "x"}).status_code == 200


def test_official_client_reads_every_field(serve: Callable[..., str]) -> None:
    url = serve()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        response = client.moderations.create(input=["violence", "calm"])
    violent, calm = response.results
    assert (violent.categories.violence, calm.categories.violence) == (True, False)
    assert violent.category_scores.sexual_minors == 0.0
    assert violent.category_applied_input_types.violence == ["text"]
    assert violent.model_extra is not None
    assert violent.model_extra["sailguard"]["violence"]["flagged"]
    assert httpx.get(f"{url}/v1/models", timeout=20).status_code == 200


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(st.sampled_from(["calm", "violence", "terror", "politics violence", ""]), min_size=1, max_size=40)
)
def test_every_result_is_that_of_its_text_alone(client: TestClient, texts: list[str]) -> None:
    response = client.post(URL, json={"input": texts})
    assert response.status_code == 200
    alone = {text: client.post(URL, json={"input": text}).json()["results"][0] for text in set(texts)}
    assert response.json()["results"] == [alone[text] for text in texts]
    flagged = any(alone[text]["flagged"] for text in texts)
    assert response.headers["X-Sailguard-Action"] == ("block" if flagged else "allow")


def test_as_many_texts_as_allowed_are_judged_and_one_more_is_refused(client: TestClient, engine: Any) -> None:
    assert len(client.post(URL, json={"input": ["calm"] * 256}).json()["results"]) == 256
    engine.batches.clear()
    response = client.post(URL, json={"input": ["calm"] * 257})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
    assert engine.batches == []


def test_role_reaches_the_engine_and_is_a_prompt_unless_said(
    client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda texts, roles: told.append(list(roles)) or score(texts, roles))
    for role in ({}, {"role": "response"}, {"role": "passage"}, {"role": "prompt"}):
        assert client.post(URL, json={"input": ["calm", "violence"], **role}).status_code == 200
    assert told == [["prompt"] * 2, ["response"] * 2, ["passage"] * 2, ["prompt"] * 2]
    assert client.post(URL, json={"input": "calm", "role": "system"}).json()["error"]["param"] == "role"


def test_truncation_is_told(client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    score = engine._score
    monkeypatch.setattr(engine, "_score", lambda text: replace(score(text), truncated=len(text) > 10))
    results = client.post(URL, json={"input": ["short", "a longer text"]}).json()["results"]
    assert [result["truncated"] for result in results] == [False, True]


def test_parallel_requests_are_judged_in_one_pass_and_each_gets_its_own(
    serve: Callable[..., str], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, entered = serve(), threading.Event()
    score = engine.score

    def slow(texts: Any, roles: Any) -> Any:
        entered.set()
        assert engine.go.wait(10)
        return score(texts, roles)

    monkeypatch.setattr(engine, "score", slow)
    depth = lambda: engine.metrics.registry.get_sample_value("sailguard_queue_depth")  # noqa: E731

    def ask(number: int) -> list[bool]:
        texts = ["violence" if place == number else "calm" for place in range(4)]
        results = httpx.post(url + URL, json={"input": texts}, timeout=20).json()["results"]
        return [result["flagged"] for result in results]

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(ask, 0)
        assert entered.wait(10)
        others = [pool.submit(ask, number) for number in range(4)]
        stop = threading.Event()
        while depth() != 5:
            assert not stop.wait(0.01)
        engine.go.set()
        assert first.result() == [True, False, False, False]
        assert [each.result() for each in others] == [[place == n for place in range(4)] for n in range(4)]
    assert [len(texts) for texts in engine.batches] == [4, 16]
    assert depth() == 0


def test_engine_that_fails_on_one_text_fails_that_request_alone(
    serve: Callable[..., str], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = engine._score

    def fragile(text: str) -> Any:
        if "fault" in text:
            raise RuntimeError(f"secret {text}")
        return score(text)

    monkeypatch.setattr(engine, "_score", fragile)
    url = serve()

    def ask(number: int) -> httpx.Response:
        return httpx.post(url + URL, json={"input": ["calm", "fault" if number % 4 == 0 else "violence"]}, timeout=20)

    with ThreadPoolExecutor(8) as pool:
        for number, response in enumerate(pool.map(ask, range(24))):
            assert response.status_code == (500 if number % 4 == 0 else 200)
            assert "secret" not in response.text


@pytest.mark.parametrize("ending", ["client", "deadline"])
def test_request_that_ends_early_leaves_the_queue(
    serve: Callable[..., str],
    engine: Any,
    metrics: Metrics,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda texts, roles: engine.go.wait(10) and score(texts, roles))
    url = serve(request_timeout=0.3 if ending == "deadline" else 60.0)
    try:
        if ending == "client":
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + URL, json={"input": "calm"}, timeout=0.3)
        else:
            response = httpx.post(url + URL, json={"input": "calm"}, timeout=20)
            assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
        pause = threading.Event()
        for _ in range(1000):
            if metrics.registry.get_sample_value("sailguard_queue_depth") == 0:
                break
            pause.wait(0.01)
        assert metrics.registry.get_sample_value("sailguard_queue_depth") == 0
    finally:
        engine.go.set()
    assert httpx.post(url + URL, json={"input": "calm"}, timeout=20).status_code == 200

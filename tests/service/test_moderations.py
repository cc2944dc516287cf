"""The moderation endpoint: OpenAI's categories where ours map, everything in our own block."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

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

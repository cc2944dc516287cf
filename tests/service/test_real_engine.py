"""The server around a real guard on the tiny model; the bank's one feature is always on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from guard.core import Guard
from guard.metrics import Metrics
from guard.policy import Policy
from guard.session import AttachedGuard
from service.engine import Engine

URL = "/v1/chat/completions"
HOOK = "blocks.1.hook_resid_post"
DOMAINS = ("pornography", "politics", "violence", "terror")
EVIDENCE = 4


@pytest.fixture
def bank(tmp_path: Path, write_bank: Callable[..., Path]) -> Path:
    return write_bank(tmp_path / "bank", evidence_tokens=EVIDENCE)


@pytest.fixture
def attach(
    bank: Path, metrics: Metrics, tiny_model: Any, tiny_tokenizer: Any
) -> Iterator[Callable[..., AttachedGuard]]:
    """Attach a guard whose one rule is on violence, with the given action and scope, in place of the last."""
    attached: list[AttachedGuard] = []

    def make(action: str, *scope: str) -> AttachedGuard:
        rule = {"domain": "violence", "scope": scope, "threshold": {"probability": 0.9}, "action": action}
        policy = Policy.model_validate({"rules": [rule], "refusal": "REFUSED"})
        for guard in attached:
            guard.close()
        attached.append(Guard.from_bank(bank, policy=policy, metrics=metrics).attach(tiny_model, tiny_tokenizer))
        return attached[-1]

    yield make
    for guard in attached:
        guard.close()


def body(**options: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello there, little model"}
    return {"model": "sailguard", "messages": [message], "temperature": 0, "max_tokens": 12, **options}


def test_served_answer_is_the_guards_own_answer(
    make_app: Callable[..., Any], attach: Callable[..., AttachedGuard], read_events: Callable[[str], Any]
) -> None:
    attached = attach("flag", "prompt", "response")
    expected = attached.chat(body()["messages"], max_new_tokens=12)
    with TestClient(make_app(Engine(attached, "tiny-llama"))) as client:
        whole = client.post(URL, json=body()).json()
        streamed = read_events(client.post(URL, json=body(stream=True)).text)
    assert whole["choices"][0]["message"]["content"] == expected.text
    assert whole["choices"][0]["finish_reason"] == expected.finish_reason
    assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert whole["usage"]["completion_tokens"] == expected.completion_tokens
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed[:-1])
    assert text == expected.text
    for block in (whole["sailguard"], streamed[-2]["sailguard"]):
        assert block["action"] == "flag"
        assert {verdict["phase"] for verdict in block["verdicts"]} == {"prompt", "response"}
        assert {verdict["bank_version"] for verdict in block["verdicts"]} == {block["bank"]}
        assert {verdict["policy_version"] for verdict in block["verdicts"]} == {block["policy"]}


@pytest.mark.parametrize("scope", ["prompt", "response"])
def test_blocked_stream_holds_back_the_deciding_token(
    make_app: Callable[..., Any],
    attach: Callable[..., AttachedGuard],
    read_events: Callable[[str], Any],
    scope: str,
) -> None:
    free = attach("flag", "prompt").chat(body()["messages"], max_new_tokens=12).text
    engine = Engine(attach("block", scope), "tiny-llama")
    with TestClient(make_app(engine)) as client:
        events = read_events(client.post(URL, json=body(stream=True)).text)
        whole = client.post(URL, json=body())
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    text = "".join(pieces)
    assert text.endswith("REFUSED")
    shown = text.removesuffix("REFUSED")
    assert free.startswith(shown)
    assert len(shown.encode()) <= (0 if scope == "prompt" else 3 * EVIDENCE)
    assert events[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert whole.json()["choices"][0]["message"]["content"] == "REFUSED"
    assert whole.headers["X-Sailguard-Action"] == "block"


def test_every_generated_token_is_counted_as_observed(
    make_app: Callable[..., Any], attach: Callable[..., AttachedGuard], metrics: Metrics
) -> None:
    with TestClient(make_app(Engine(attach("flag", "response"), "tiny-llama"))) as client:
        answers = [client.post(URL, json=body(max_tokens=tokens)).json() for tokens in (1, 5, 12)]
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    value = metrics.registry.get_sample_value
    assert value("sailguard_tokens_generated_total") == value("sailguard_tokens_observed_total") == generated


def test_texts_are_scored_and_odd_ones_are_benign_or_read(
    make_app: Callable[..., Any], attach: Callable[..., AttachedGuard]
) -> None:
    texts = ["a sentence of some length", "", "\udc00", "x" * 5000]
    with TestClient(make_app(Engine(attach("block", "prompt"), "tiny-llama"))) as client:
        response = client.post(
            "/v1/moderations",
            content=json.dumps({"input": texts}),
            headers={"Content-Type": "application/json"},
        )
    assert response.status_code == 200
    results = response.json()["results"]
    assert results[0]["categories"]["violence"] is True
    assert results[0]["sailguard"]["violence"]["action"] == "block"
    assert (results[1]["flagged"], results[1]["tokens"]) == (False, 0)
    assert [result["truncated"] for result in results] == [False, False, False, True]


def test_prompt_beyond_the_context_is_refused_by_count(
    make_app: Callable[..., Any], attach: Callable[..., AttachedGuard]
) -> None:
    with TestClient(make_app(Engine(attach("flag", "prompt"), "tiny-llama"))) as client:
        long = [{"role": "user", "content": "x" * 600}]
        error = client.post(URL, json=body(messages=long)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512 tokens" in error["message"]


def test_disconnect_leaves_the_guard_fit_for_the_next_request(
    serve: Callable[..., str], attach: Callable[..., AttachedGuard]
) -> None:
    attached = attach("flag", "response")
    url = serve(Engine(attached, "tiny-llama"), max_queue=0)
    expected = attached.chat(body()["messages"], max_new_tokens=12).text
    with httpx.Client(base_url=url, timeout=30) as client:
        with client.stream("POST", URL, json=body(stream=True, max_tokens=400)) as response:
            assert next(response.iter_lines())
        deadline = time.monotonic() + 20
        while (answer := client.post(URL, json=body())).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_engine_that_was_closed_leaves_no_hook(tiny_model: Any, attach: Callable[..., AttachedGuard]) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny_model.modules())

    before = hooks()
    engine = Engine(attach("flag", "prompt"), "tiny-llama")
    assert hooks() > before
    engine.close()
    assert hooks() == before

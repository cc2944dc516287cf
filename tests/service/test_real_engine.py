"""The server around a real guard on the tiny model; the bank's one feature is always on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from feature_bank.spool import Spool
from guard.core import Guard
from guard.metrics import Metrics
from guard.policy import Policy
from guard.serving import ServingGuard
from service.engine import TransformersEngine

URL = "/v1/chat/completions"
HOOK = "blocks.1.hook_resid_post"
DOMAINS = ("pornography", "politics", "violence", "terror")
EVIDENCE = 4


@pytest.fixture
def bank(tmp_path: Path, write_bank: Callable[..., Path]) -> Path:
    return write_bank(tmp_path / "bank", evidence_tokens=EVIDENCE)


Start = Callable[..., TransformersEngine]


@pytest.fixture
def guard(bank: Path, metrics: Metrics) -> Callable[..., Guard]:
    """A guard whose one rule is on violence, with the given action and scope."""

    def make(action: str, *scope: str) -> Guard:
        rule = {"domain": "violence", "scope": scope, "threshold": {"probability": 0.9}, "action": action}
        policy = Policy.model_validate({"rules": [rule], "refusal": "REFUSED"})
        return Guard.from_bank(bank, policy=policy, metrics=metrics)

    return make


@pytest.fixture
def start(guard: Callable[..., Guard], tiny_model: Any, tiny_tokenizer: Any) -> Iterator[Start]:
    """An engine under such a guard, in place of the last."""
    engines: list[TransformersEngine] = []

    def make(action: str, *scope: str) -> TransformersEngine:
        for engine in engines:
            engine.close()
        serving = ServingGuard(guard(action, *scope), tiny_model, tiny_tokenizer, cache_tokens=4096)
        engines.append(TransformersEngine(serving, "tiny-llama"))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def free(guard: Callable[..., Guard], tiny_model: Any, tiny_tokenizer: Any) -> Any:
    """What the model answers when nothing is blocked."""
    with guard("flag", "prompt", "response").attach(tiny_model, tiny_tokenizer) as attached:
        return attached.chat(body()["messages"], max_new_tokens=12)


def body(**options: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hello there, little model"}
    return {"model": "sailguard", "messages": [message], "temperature": 0, "max_tokens": 12, **options}


def test_served_answer_is_the_guards_own_answer(
    make_app: Callable[..., Any], free: Any, start: Start, read_events: Callable[[str], Any]
) -> None:
    expected = free
    with TestClient(make_app(start("flag", "prompt", "response"))) as client:
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
    free: Any,
    start: Start,
    read_events: Callable[[str], Any],
    scope: str,
) -> None:
    with TestClient(make_app(start("block", scope))) as client:
        events = read_events(client.post(URL, json=body(stream=True)).text)
        whole = client.post(URL, json=body())
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    text = "".join(pieces)
    assert text.endswith("REFUSED")
    shown = text.removesuffix("REFUSED")
    assert free.text.startswith(shown)
    assert len(shown.encode()) <= (0 if scope == "prompt" else 3 * EVIDENCE)
    assert events[-2]["choices"][0]["finish_reason"] == "content_filter"
    assert whole.json()["choices"][0]["message"]["content"] == "REFUSED"
    assert whole.headers["X-Sailguard-Action"] == "block"


def test_every_generated_token_is_counted_as_observed(
    make_app: Callable[..., Any], start: Start, metrics: Metrics
) -> None:
    with TestClient(make_app(start("flag", "response"))) as client:
        answers = [client.post(URL, json=body(max_tokens=tokens)).json() for tokens in (1, 5, 12)]
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    value = metrics.registry.get_sample_value
    assert value("sailguard_tokens_generated_total") == value("sailguard_tokens_observed_total") == generated


def test_texts_are_scored_and_odd_ones_are_benign_or_read(make_app: Callable[..., Any], start: Start) -> None:
    texts = ["a sentence of some length", "", "\udc00", "x" * 5000]
    with TestClient(make_app(start("block", "prompt"))) as client:
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


def test_prompt_beyond_the_context_is_refused_by_count(make_app: Callable[..., Any], start: Start) -> None:
    with TestClient(make_app(start("flag", "prompt"))) as client:
        long = [{"role": "user", "content": "x" * 600}]
        error = client.post(URL, json=body(messages=long)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512 tokens" in error["message"]


def test_disconnect_leaves_the_guard_fit_for_the_next_request(
    serve: Callable[..., str], free: Any, start: Start
) -> None:
    url = serve(start("flag", "response"), max_queue=0, max_concurrent=1)
    expected = free.text
    with httpx.Client(base_url=url, timeout=30) as client:
        with client.stream("POST", URL, json=body(stream=True, max_tokens=400)) as response:
            assert next(response.iter_lines())
        deadline = time.monotonic() + 20
        while (answer := client.post(URL, json=body())).status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_engine_that_was_closed_leaves_no_hook(tiny_model: Any, start: Start) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny_model.modules())

    before = hooks()
    engine = start("flag", "prompt")
    assert hooks() > before
    engine.close()
    assert hooks() == before


# ---- what is spooled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["flag", "block"])
def test_what_is_spooled_of_a_chat_is_what_it_was_judged_by(
    start: Start, make_app: Callable[..., Any], tmp_path: Path, action: str
) -> None:
    file = tmp_path / "spool.db"
    engine = start(action, "response")
    with TestClient(make_app(engine, spool=file, spool_share=1.0)) as client:
        answer = client.post(URL, json=body())
        judged = client.post("/v1/moderations", json={"input": "A heron stands in the reeds."})
    assert answer.status_code == judged.status_code == 200
    with Spool.open_for_reading(file) as spool:
        items = {(item.endpoint, item.phase): item for item in spool.items()}
    assert items.keys() == {("chat", "prompt"), ("chat", "response"), ("moderations", "prompt")}
    judge = engine._serving.monitor
    for item in items.values():
        assert item.content_hash == engine.bank.content_hash
        seen = item.activations()
        assert seen.acts.shape == (item.tokens, len(engine.bank.features))
        assert (seen.acts > 0).any()  # the bank's one feature is always on
        if not item.streamed:
            found = judge.judge(seen.acts, seen.segments).agreed.max(0)
            scores = {name: 1 / (1 + math.exp(-float(value))) for name, value in zip(judge.domains, found, strict=True)}
            assert item.scores == pytest.approx({**dict.fromkeys(DOMAINS, 0.0), **scores}, abs=1e-3)
    response = items["chat", "response"]
    assert (response.action, response.flagged, response.streamed) == (action, ("violence",), True)
    assert response.tokens == answer.json()["usage"]["completion_tokens"] or action == "block"
    assert response.tokens >= EVIDENCE

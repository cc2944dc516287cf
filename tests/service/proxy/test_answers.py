"""Whole answers: a blocked choice is the refusal alone, everything else passes as it came."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

from tests.service.proxy.keywords import (
    CHAT,
    DELICATE,
    REFUSAL,
    WORD,
    ask,
)
from tests.service.upstream_server import HEAD, Received, Speaker, UpstreamServer, message


def test_an_answer_passes_as_it_came_with_a_block_beside_it(client: httpx.Client, upstream: UpstreamServer) -> None:
    answer = message("of lakes", usage={"total_tokens": 7}, system_fingerprint="f1", odd={"a": 1})
    answer["choices"][0] |= {"logprobs": {"content": [{"token": "of", "top_logprobs": []}]}, "stop_reason": None}
    upstream.script = lambda request, say: say.json(answer)
    response = client.post(CHAT, json=ask())
    body = response.json()
    block = body.pop("sailguard")
    assert body == answer
    assert (block["action"], block["bank"], block["policy"]) == ("allow", "bank-1", "policy-1")
    assert block["truncated"] is False
    assert response.headers["X-Sailguard-Action"] == "allow"


HARMFUL_MESSAGES: dict[str, dict[str, Any]] = {
    "content": {"content": f"a {WORD} there"},
    "reasoning": {"content": "fine", "reasoning_content": f"a {WORD} there"},
    "refusal": {"content": None, "refusal": WORD},
    "arguments": {
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"\\u0076olcano": 1}'}}],
    },
    "tool name": {"content": None, "tool_calls": [{"id": "1", "function": {"name": WORD, "arguments": "{}"}}]},
    "function": {"content": None, "function_call": {"name": "f", "arguments": f"{WORD} unclosed"}},
    "unknown": {"content": "fine", "thoughts": [{"deep": {"text": WORD}}]},
}


@pytest.mark.parametrize("name", HARMFUL_MESSAGES)
def test_a_blocked_choice_is_the_refusal_alone(client: httpx.Client, upstream: UpstreamServer, name: str) -> None:
    answer = message("fine", prompt_token_ids=[1], usage={"total_tokens": 7})
    answer["choices"].append(
        {
            "index": 1,
            "message": {"role": "assistant", **HARMFUL_MESSAGES[name]},
            "logprobs": {"content": [{"token": WORD}]},
            "token_ids": [4, 5],
            "finish_reason": "stop",
        }
    )
    upstream.script = lambda request, say: say.json(answer)
    response = client.post(CHAT, json=ask(n=2))
    assert WORD not in response.text.replace("violence", "")
    body = response.json()
    assert body["choices"][0] == answer["choices"][0]
    assert body["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": REFUSAL, "refusal": None},
        "logprobs": None,
        "finish_reason": "content_filter",
    }
    assert {verdict["choice"] for verdict in body["sailguard"]["verdicts"]} == {1}
    assert response.headers["X-Sailguard-Action"] == "block"
    assert body["usage"] == {"total_tokens": 7}
    assert "prompt_token_ids" not in body


def test_text_beside_the_choices_is_judged_too(client: httpx.Client, upstream: UpstreamServer) -> None:
    upstream.script = lambda request, say: say.json(message("fine", thoughts={"text": WORD}))
    response = client.post(CHAT, json=ask())
    assert WORD not in response.text
    assert response.json()["choices"][0]["message"]["content"] == "fine"
    assert response.json()["sailguard"]["action"] == "block"


def test_a_completion_is_judged_by_its_text(client: httpx.Client, upstream: UpstreamServer) -> None:
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(["fine", f"x {WORD}"])]
    upstream.script = lambda request, say: say.json({**HEAD, "object": "text_completion", "choices": choices})
    body = client.post("/v1/completions", json={"model": "m", "prompt": "a", "n": 2}).json()
    assert [choice["text"] for choice in body["choices"]] == ["fine", REFUSAL]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "content_filter"]


def test_a_flag_passes_and_is_told(client: httpx.Client, upstream: UpstreamServer) -> None:
    upstream.script = lambda request, say: say.json(message(f"a {DELICATE}"))
    response = client.post(CHAT, json=ask())
    assert response.json()["choices"][0]["message"]["content"] == f"a {DELICATE}"
    assert response.headers["X-Sailguard-Action"] == response.json()["sailguard"]["action"] == "flag"


def test_truncation_is_told(client: httpx.Client) -> None:
    assert client.post(CHAT, json=ask("long [cut]")).json()["sailguard"]["truncated"] is True


@pytest.mark.parametrize("body", [[], {}, {"choices": "none"}, {"choices": ["none"]}])
def test_an_answer_of_another_shape_is_the_upstreams_failure(
    client: httpx.Client, upstream: UpstreamServer, body: Any
) -> None:
    upstream.script = lambda request, say: say.json(body)
    response = client.post(CHAT, json=ask())
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_error")


def test_a_compressed_answer_is_read(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head(200, "application/json", Content_Encoding="gzip")
        await say.raw(gzip.compress(json.dumps(message(WORD)).encode()))

    upstream.script = script
    assert client.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] == REFUSAL

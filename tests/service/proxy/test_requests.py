"""What goes to the upstream: all of it judged, and nothing that it must not see."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from service.errors import SettingsError
from service.upstream import Upstream
from tests.service.proxy.keywords import (
    CHAT,
    PATIENCE,
    REFUSAL,
    WORD,
    KeywordEngine,
    ask,
    events_of,
    finishes,
    said,
)
from tests.service.upstream_server import UpstreamServer


def test_a_request_passes_on_whole_with_what_this_server_does_not_know(
    client: httpx.Client, upstream: UpstreamServer
) -> None:
    body = ask(
        tools=[{"type": "function", "function": {"name": "find"}}], logprobs=True, best_of=3, strange={"a": [1.5]}
    )
    response = client.post(CHAT, json=body)
    assert response.status_code == 200
    (request,) = upstream.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.json == body


def test_of_a_repeated_field_the_upstream_sees_what_was_judged(client: httpx.Client, upstream: UpstreamServer) -> None:
    first, last = (json.dumps([{"role": "user", "content": content}]) for content in (WORD, "lakes"))
    text = f'{{"model": "m", "messages": {first}, "messages": {last}}}'
    response = client.post(CHAT, content=text, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert upstream.requests[0].body.count(b"messages") == 1
    assert WORD.encode() not in upstream.requests[0].body


BLOCKED_BODIES = {
    "user": ask(f"about a {WORD}"),
    "part": ask([{"type": "text", "text": "a"}, {"type": "text", "text": WORD}]),
    "parts of a word": ask([{"type": "text", "text": WORD[:3]}, {"type": "text", "text": WORD[3:]}]),
    "system": {"messages": [{"role": "system", "content": WORD}, {"role": "user", "content": "hi"}]},
    "tool": {"messages": [{"role": "tool", "tool_call_id": "1", "content": WORD}]},
    "assistant": {"messages": [{"role": "assistant", "content": WORD}, {"role": "user", "content": "go on"}]},
    "name": {"messages": [{"role": "user", "name": WORD, "content": "hi"}]},
    "arguments": {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": "\\u0076olcano"}'}}],
            }
        ]
    },
    "tool description": ask(tools=[{"type": "function", "function": {"name": "f", "description": WORD}}]),
    "another spelling": {**ask(), "Messages": [{"role": "user", "content": WORD}]},
    "long id": {"messages": [{"role": "tool", "tool_call_id": f"{WORD} " * 20, "content": "hi"}]},
}


@pytest.mark.parametrize("name", BLOCKED_BODIES)
def test_a_blocked_prompt_never_reaches_the_upstream(
    client: httpx.Client, upstream: UpstreamServer, judge: KeywordEngine, name: str
) -> None:
    response = client.post(CHAT, json={"model": "m", **BLOCKED_BODIES[name]})
    assert response.status_code == 200
    body = response.json()
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == REFUSAL
    assert body["sailguard"]["action"] == "block"
    assert body["sailguard"]["verdicts"][0]["choice"] == 0
    assert body["object"] == "chat.completion"
    assert response.headers["X-Sailguard-Action"] == "block"
    assert upstream.requests == []


def test_a_blocked_prompt_is_refused_in_a_stream_for_every_choice(
    client: httpx.Client, upstream: UpstreamServer
) -> None:
    response = client.post(CHAT, json=ask(WORD, stream=True, n=2, stream_options={"include_usage": True}))
    assert response.headers["X-Sailguard-Action"] == "block"
    events = events_of(response.text)
    assert events[-1] == "[DONE]"
    assert finishes(events) == {0: "content_filter", 1: "content_filter"}
    assert [said(events, index) for index in (0, 1)] == [REFUSAL, REFUSAL]
    assert events[-2]["usage"]["completion_tokens"] == 0
    assert upstream.requests == []


def test_a_blocked_prompt_of_a_completion_is_refused_as_text(client: httpx.Client, upstream: UpstreamServer) -> None:
    body = client.post("/v1/completions", json={"model": "m", "prompt": ["a", WORD]}).json()
    assert [choice["text"] for choice in body["choices"]] == [REFUSAL, REFUSAL]
    assert body["object"] == "text_completion"
    assert upstream.requests == []


def test_texts_are_judged_in_the_role_that_they_have(client: httpx.Client, judge: KeywordEngine) -> None:
    roles = ("system", "user", "assistant", "tool", "developer")
    client.post(CHAT, json={"model": "m", "messages": [{"role": role, "content": f"text of {role}"} for role in roles]})
    assert [(text, role) for text, role in judge.judged if text.startswith("text of")] == [
        (f"text of {role}", "response" if role == "assistant" else "prompt") for role in roles
    ]


UNJUDGEABLE = {
    "image": (CHAT, ask([{"type": "image_url", "image_url": {"url": "data:,"}}]), "messages[0].content[0]"),
    "audio": (CHAT, ask(modalities=["text", "audio"]), "modalities"),
    "token ids": ("/v1/completions", {"model": "m", "prompt": [1, 2]}, "prompt"),
    "lists of token ids": ("/v1/completions", {"model": "m", "prompt": [[1], [2]]}, "prompt"),
    "embeddings": ("/v1/completions", {"model": "m", "prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
    "no messages": (CHAT, {"model": "m"}, "messages"),
    "a message that is none": (CHAT, {"model": "m", "messages": ["hi"]}, "messages[0]"),
    "content that is none": (CHAT, ask({"text": "hi"}), "messages[0].content"),
    "too many choices": (CHAT, ask(n=1000), "n"),
    "no object": (CHAT, [], None),
}


@pytest.mark.parametrize("name", UNJUDGEABLE)
def test_what_cannot_be_judged_is_refused(client: httpx.Client, upstream: UpstreamServer, name: str) -> None:
    path, body, param = UNJUDGEABLE[name]
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert upstream.requests == []


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/audio/speech", "/v1/files", "/tokenize"])
def test_no_other_endpoint_is_reached(client: httpx.Client, upstream: UpstreamServer, path: str) -> None:
    assert client.post(path, json={"input": "hi"}).status_code == 404
    assert upstream.requests == []


def test_a_form_is_no_request(client: httpx.Client, upstream: UpstreamServer) -> None:
    response = client.post(CHAT, content=json.dumps(ask()), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert upstream.requests == []


def test_headers_pass_only_if_they_are_meant_to(client: httpx.Client, upstream: UpstreamServer) -> None:
    client.post(
        CHAT,
        json=ask(),
        headers={
            "Authorization": "Bearer mine",
            "Cookie": "a=b",
            "X-Forwarded-For": "10.0.0.1",
            "OpenAI-Project": "p1",
            "TE": "trailers",
        },
    )
    headers = upstream.requests[0].headers
    assert headers["authorization"] == "Bearer mine"
    assert headers["openai-project"] == "p1"
    assert not {"cookie", "x-forwarded-for", "te", "transfer-encoding"} & set(headers)
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({"api_keys": "inner"}, None),
        ({"api_keys": "inner", "upstream_key": "outer"}, "Bearer outer"),
        ({"upstream_key": "outer"}, "Bearer outer"),
    ],
)
def test_a_key_of_this_server_never_reaches_the_upstream(
    proxy: Callable[..., str], upstream: UpstreamServer, settings: dict[str, str], sent: str | None
) -> None:
    url = proxy(**settings)
    response = httpx.post(f"{url}{CHAT}", json=ask(), headers={"Authorization": "Bearer inner"}, timeout=PATIENCE)
    assert response.status_code == 200
    assert upstream.requests[0].headers.get("authorization") == sent


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://u:secret@h/v1", "http://h/v1?a=b", "http://[::1", "h"],
)
def test_a_url_that_is_none_is_refused_without_saying_passwords(url: str) -> None:
    with pytest.raises(SettingsError, match="upstream") as refused:
        Upstream(url, connections=1, timeout=1.0)
    assert "secret" not in str(refused.value)

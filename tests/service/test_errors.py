"""Every refusal has OpenAI's shape and the right status, and none quotes a prompt."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import errors

URL = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def error_of(response: Any) -> dict[str, Any]:
    """The error object, after a check of its shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_parameter"),
        ({"no_such_thing": 1}, "no_such_thing", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ],
)
def test_what_the_server_cannot_honour_is_refused_by_name(
    client: TestClient, chat: Callable[..., Any], changes: dict[str, Any], param: str, code: str
) -> None:
    response = client.post(URL, json=chat() | changes)
    error = error_of(response)
    assert response.status_code == 400
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert param.split("[")[0] in error["message"]


def test_unsupported_parameters_with_neutral_values_are_accepted(client: TestClient, chat: Callable[..., Any]) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "user": "u",
        "temperature": None,
        "stream": None,
    }
    assert client.post(URL, json=chat(**neutral)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 20000,
        b"[]",
        b"null",
        b'"text"',
        b"{}",
    ],
)
@pytest.mark.parametrize("url", [URL, "/v1/moderations"])
def test_malformed_bodies_are_400(client: TestClient, url: str, body: bytes) -> None:
    response = client.post(url, content=body, headers=JSON)
    assert response.status_code == 400
    error_of(response)


def test_body_of_another_content_type_is_refused(client: TestClient, chat: Callable[..., Any]) -> None:
    response = client.post(URL, content=json.dumps(chat()), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_content_type"


@pytest.mark.parametrize("url", [URL, "/v1/moderations"])
def test_unknown_model_is_404(client: TestClient, chat: Callable[..., Any], url: str) -> None:
    body = chat() if url == URL else {"input": "x"}
    response = client.post(url, json=body | {"model": "gpt-4o"})
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-4o" in error["message"]


def test_unknown_url_and_method_have_the_shape_too(client: TestClient) -> None:
    unknown, method = client.get("/v1/nothing"), client.get(URL)
    assert (unknown.status_code, method.status_code) == (404, 405)
    assert error_of(unknown)["code"] == "unknown_url"
    assert error_of(method)["code"] == "method_not_supported"


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_400_before_anything_is_generated(
    client: TestClient, engine: Any, chat: Callable[..., Any], stream: bool
) -> None:
    response = client.post(URL, json=chat("word " * 64, stream=stream))
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"
    assert "64 tokens" in error_of(response)["message"]
    assert engine.calls == []


def test_messages_that_the_chat_template_refuses_are_400(client: TestClient, chat: Callable[..., Any]) -> None:
    response = client.post(URL, json=chat("TEMPLATE"))
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages"


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit_is_413_however_it_is_sent(
    serve: Callable[..., str], engine: Any, chat: Callable[..., Any], chunked: bool
) -> None:
    url = serve(max_body_bytes=2048)
    body = json.dumps(chat("x" * 4096)).encode()

    def pieces() -> Any:
        for start in range(0, len(body), 512):
            yield body[start : start + 512]

    response = httpx.post(url + URL, content=pieces() if chunked else body, headers=JSON, timeout=20)
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert engine.calls == []
    assert httpx.post(url + URL, json=chat("x" * 1024), timeout=20).status_code == 200


def test_failure_inside_is_a_500_that_quotes_nothing(
    client: TestClient, log: io.StringIO, chat: Callable[..., Any]
) -> None:
    response = client.post(URL, json=chat("one CRASH"))
    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "server_error"
    assert response.headers["X-Request-Id"] in log.getvalue()
    assert "secret" not in response.text + log.getvalue()


def test_every_answer_has_the_security_headers_and_no_cors(client: TestClient, chat: Callable[..., Any]) -> None:
    origin = {"Origin": "https://example.org"}
    answers = [
        client.post(URL, json=chat(), headers=origin),
        client.post(URL, json=chat(stream=True), headers=origin),
        client.post(URL, json={}, headers=origin),
        client.get("/healthz", headers=origin),
        client.get("/nothing", headers=origin),
        client.options(URL, headers=origin | {"Access-Control-Request-Method": "POST"}),
    ]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Request-Id"].startswith("req_")
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_log_holds_id_status_action_and_time_and_no_text(
    client: TestClient, log: io.StringIO, chat: Callable[..., Any]
) -> None:
    answers = [
        client.post(URL, json=chat("confidential BLOCK")),
        client.post(URL, json=chat("confidential words", stream=True)),
        client.post(URL, json=chat() | {"confidential": 1}),
        client.post("/v1/moderations", json={"input": "confidential"}),
        client.get("/v1/confidential"),
    ]
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["request_id"] for line in lines] == [answer.headers["X-Request-Id"] for answer in answers]
    assert [line["status"] for line in lines] == [200, 200, 400, 200, 404]
    assert [line["action"] for line in lines] == ["block", "allow", None, "allow", None]
    assert all(line["ms"] >= 0 for line in lines)
    assert "confidential" not in log.getvalue()


def test_debug_logging_of_libraries_brings_no_text_either(
    client: TestClient, caplog: pytest.LogCaptureFixture, chat: Callable[..., Any]
) -> None:
    with caplog.at_level("DEBUG"):
        client.post(URL, json=chat("confidential words", stream=True))
    assert "confidential" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "code", "names"),
    [
        (errors.forbidden("reader"), 403, "insufficient_permissions", "reader"),
        (errors.admin_closed(), 403, "admin_closed", "SAILGUARD_ADMIN_KEYS"),
        (errors.host_not_allowed(), 403, "host_not_allowed", "SAILGUARD_ALLOWED_HOSTS"),
        (errors.origin_not_allowed(), 403, "origin_not_allowed", "SAILGUARD_CORS_ORIGINS"),
        (errors.body_too_slow(2.5), 408, "request_timeout", "2.5 s"),
        (errors.rate_limited(7, "600 per 1 minute"), 429, "rate_limit_exceeded", "600 per 1 minute"),
        (errors.too_many_open(8), 429, "rate_limit_exceeded", "8 open requests"),
    ],
)
def test_refusals_at_the_edge_say_what_to_do(error: errors.ApiError, status: int, code: str, names: str) -> None:
    response = errors.error_response(error)
    assert response.status_code == status
    found = error_of(httpx.Response(status, content=bytes(response.body)))
    assert found["code"] == code
    assert names in found["message"]
    assert ("Retry-After" in response.headers) == (status == 429)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["model", "messages", "stream", "stop", "n", "seed", "temperature", "max_tokens", "tools", "input"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_no_json_body_is_a_server_error(client: TestClient, chat: Callable[..., Any], changes: dict[str, Any]) -> None:
    for url, body in ((URL, chat() | changes), ("/v1/moderations", {"input": "x"} | changes)):
        response = client.post(url, content=json.dumps(body), headers=JSON)
        assert response.status_code in (200, 400, 404)
        if response.status_code != 200:
            error_of(response)


@pytest.mark.parametrize(
    ("path", "methods"), [("/v1/compare", "GET, POST"), ("/v1/traces", "POST"), ("/", "GET, HEAD")]
)
def test_a_method_that_a_path_does_not_have_is_answered_with_all_that_it_has(
    client: TestClient, path: str, methods: str
) -> None:
    response = client.put(path)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_supported")
    assert response.headers["allow"] == methods

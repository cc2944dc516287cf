"""The chat endpoint: OpenAI's shape, nothing said after a block, one generation at a time."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

URL = "/v1/chat/completions"
REFUSAL = "I cannot help with that."


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def texts_of(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "") for event in events if event != "[DONE]" for choice in event["choices"]
    )


def test_whole_answer_has_the_text_usage_verdict_block_and_action_header(
    client: TestClient, chat: Callable[..., Any]
) -> None:
    response = client.post(URL, json=chat())
    assert response.status_code == 200
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny-guarded"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "one two three "
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    block = body["sailguard"]
    assert (block["action"], block["verdicts"]) == ("allow", [])
    assert (block["bank"], block["policy"]) == ("bank-1", "policy-1")
    assert set(block["prompt_scores"]) == set(block["response_scores"])
    assert response.headers["X-Sailguard-Action"] == "allow"


def test_streamed_and_whole_answers_are_the_same_text(
    client: TestClient, chat: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    whole = client.post(URL, json=chat()).json()["choices"][0]["message"]["content"]
    response = client.post(URL, json=chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    assert texts_of(events) == whole
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["sailguard"]["action"] == "allow"
    assert len({event["id"] for event in events[:-1]}) == 1


def test_usage_is_streamed_last_and_only_when_asked_for(
    client: TestClient, chat: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    events = read_events(client.post(URL, json=body).text)
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert all(event["usage"] is None for event in events[:-2])
    without = read_events(client.post(URL, json=chat(stream=True)).text)
    assert all("usage" not in event for event in without[:-1])


def test_no_text_reaches_the_socket_after_the_deciding_event(
    client: TestClient, chat: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    response = client.post(URL, json=chat("one BLOCK two", stream=True))
    events = read_events(response.text)
    assert texts_of(events) == "one " + REFUSAL
    assert "LEAK" not in response.text
    last = events[-2]
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert last["choices"][0]["delta"] == {}
    assert last["sailguard"]["action"] == "block"
    (verdict,) = last["sailguard"]["verdicts"]
    assert (verdict["domain"], verdict["features"][0]["explanation"]) == ("violence", "a weapon")


def test_blocked_whole_answer_is_the_refusal_alone(client: TestClient, chat: Callable[..., Any]) -> None:
    response = client.post(URL, json=chat("one BLOCK two"))
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == REFUSAL
    assert response.headers["X-Sailguard-Action"] == "block"
    assert "LEAK" not in response.text


def test_sampling_options_reach_the_engine(client: TestClient, engine: Any, chat: Callable[..., Any]) -> None:
    options = {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": "END", "max_completion_tokens": 2}
    body = client.post(URL, json=chat(**options)).json()
    told = {"max_new_tokens": 2, "temperature": 0.0, "top_p": 0.5, "seed": 7, "stop": ("END",), "steer": ()}
    assert engine.calls == [told]
    assert body["choices"][0]["finish_reason"] == "length"


def test_token_limit_is_capped_by_setting_and_by_context(
    make_app: Callable[..., Any], engine: Any, chat: Callable[..., Any]
) -> None:
    with TestClient(make_app(max_new_tokens=5)) as client:
        client.post(URL, json=chat(max_tokens=50))
        client.post(URL, json=chat())
        client.post(URL, json=chat("word " * 62))
    assert [call["max_new_tokens"] for call in engine.calls] == [5, 5, 2]


def test_choices_have_seeds_of_their_own(
    client: TestClient, engine: Any, chat: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    body = client.post(URL, json=chat(n=3, seed=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [call["seed"] for call in engine.calls] == [5, 6, 7]
    assert body["usage"]["completion_tokens"] == 9
    events = read_events(client.post(URL, json=chat(n=2, stream=True)).text)[:-1]
    finished = [event for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(event["choices"][0]["index"] for event in finished) == [0, 1]
    assert not engine.overlapped


def test_text_parts_are_joined_and_developer_messages_are_system_messages(client: TestClient, engine: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a b "}, {"type": "text", "text": "c"}]},
    ]
    response = client.post(URL, json={"model": "sailguard", "messages": messages})
    assert response.status_code == 200
    assert engine.chats == [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "a b c"}]]


@pytest.mark.parametrize("content", ["", "\ud800", "a \udfff b", "\x00", "\U0001f600"])
@pytest.mark.parametrize("stream", [False, True])
def test_odd_text_never_is_a_server_error(
    client: TestClient, engine: Any, chat: Callable[..., Any], content: str, stream: bool
) -> None:
    response = client.post(
        URL, content=json.dumps(chat(content, stream=stream)), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200
    engine.chats[-1][-1]["content"].encode()


def test_queue_is_bounded_and_the_one_too_many_is_told_when_to_return(
    serve: Callable[..., str], engine: Any, metrics: Any, chat: Callable[..., Any]
) -> None:
    url = serve(max_queue=1, max_concurrent=1)
    depth = lambda: metrics.registry.get_sample_value("sailguard_queue_depth")  # noqa: E731
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=url, timeout=20) as client:
        try:
            running = pool.submit(client.post, URL, json=chat("WAIT one"))
            assert engine.started.acquire(timeout=10)
            waiting = pool.submit(client.post, URL, json=chat("two"))
            wait_until(lambda: depth() == 1)
            refused = client.post(URL, json=chat("three"))
        finally:
            engine.go.set()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["Retry-After"]) >= 1
        assert running.result().status_code == waiting.result().status_code == 200
        assert client.post(URL, json=chat("five")).status_code == 200
    assert depth() == 0
    assert not engine.overlapped


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_ends_the_generation_and_frees_the_engine(
    serve: Callable[..., str], engine: Any, log: io.StringIO, chat: Callable[..., Any], stream: bool
) -> None:
    url = serve(max_queue=0, max_concurrent=1)
    body = chat("one WAIT " + "word " * 30, stream=stream)
    with httpx.Client(base_url=url, timeout=20) as client:
        if stream:
            with client.stream("POST", URL, json=body) as response:
                assert next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(URL, json=body, timeout=0.5)
    assert engine.started.acquire(timeout=10)
    wait_until(lambda: '"status": 499' in log.getvalue())
    wait_until(lambda: engine.streams_ended == 1)
    assert engine.steps < 10
    with httpx.Client(base_url=url, timeout=20) as client:
        wait_until(lambda: client.post(URL, json=chat("next")).status_code == 200)
    assert not engine.overlapped


def test_disconnect_takes_a_waiting_request_out_of_the_queue(
    serve: Callable[..., str], engine: Any, metrics: Any, chat: Callable[..., Any]
) -> None:
    url = serve(max_queue=1, max_concurrent=1)
    depth = lambda: metrics.registry.get_sample_value("sailguard_queue_depth")  # noqa: E731
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=20) as client:
        try:
            running = pool.submit(client.post, URL, json=chat("WAIT one"))
            assert engine.started.acquire(timeout=10)
            with pytest.raises(httpx.ReadTimeout):
                client.post(URL, json=chat("two"), timeout=0.5)
            wait_until(lambda: depth() == 0)
        finally:
            engine.go.set()
        assert running.result().status_code == 200
    assert len(engine.calls) == 1


def test_slow_reader_does_not_hold_the_engine(serve: Callable[..., str], engine: Any, chat: Callable[..., Any]) -> None:
    url = serve(max_queue=0)
    with (
        httpx.Client(base_url=url, timeout=20) as client,
        client.stream("POST", URL, json=chat("one two", stream=True)),
    ):
        wait_until(lambda: engine.streams_ended == 1)
        other = httpx.post(url + URL, json=chat("next"), timeout=20)
        assert other.status_code == 200


def test_error_within_a_stream_is_an_error_event_without_done(
    client: TestClient, log: io.StringIO, chat: Callable[..., Any], read_events: Callable[[str], list[Any]]
) -> None:
    response = client.post(URL, json=chat("one CRASH", stream=True))
    events = read_events(response.text)
    assert events[-1]["error"]["code"] == "internal_error"
    assert "[DONE]" not in events
    assert "secret" not in response.text + log.getvalue()
    assert "GuardError" in log.getvalue()
    assert client.post(URL, json=chat()).status_code == 200


def test_parallel_requests_are_served_side_by_side_and_each_gets_its_own(
    serve: Callable[..., str], engine: Any, chat: Callable[..., Any]
) -> None:
    url = serve(max_queue=64, max_concurrent=4)
    barrier = threading.Barrier(8)

    def ask(number: int) -> str:
        barrier.wait(10)
        response = httpx.post(url + URL, json=chat(f"answer {number}"), timeout=20)
        return str(response.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [f"answer {number} " for number in range(8)]
    assert not engine.overlapped

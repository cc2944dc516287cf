"""The completions endpoint: plain texts continued, several at a time, each choice in its place."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

URL = "/v1/completions"
REFUSAL = "I cannot help with that."


def ask(prompt: Any = "one two three", **options: Any) -> dict[str, Any]:
    return {"model": "sailguard", "prompt": prompt, **options}


def texts_of(events: list[Any]) -> dict[int, str]:
    """The text of every choice of a stream."""
    texts: dict[int, str] = {}
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_whole_continuation_has_the_text_usage_and_verdict_block(client: TestClient, engine: Any) -> None:
    response = client.post(URL, json=ask())
    assert response.status_code == 200
    body = response.json()
    assert (body["object"], body["model"]) == ("text_completion", "tiny-guarded")
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "one two three ", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body["sailguard"]["action"] == response.headers["X-Sailguard-Action"] == "allow"
    assert engine.chats == [], "no chat template comes between"


def test_choices_stand_prompt_by_prompt_each_with_a_seed_of_its_own(client: TestClient, engine: Any) -> None:
    body = client.post(URL, json=ask(["one two", "three"], n=3, seed=7)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == ["one two "] * 3 + ["three "] * 3
    assert [call["seed"] for call in engine.calls] == [7, 8, 9] * 2
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert not engine.overlapped


def test_seeds_stay_in_range_and_without_one_there_is_none(client: TestClient, engine: Any) -> None:
    for seed in (-1, 2**63 - 1, None, 0):
        assert client.post(URL, json=ask("one", seed=seed, n=2)).status_code == 200
    seeds = [call["seed"] for call in engine.calls]
    assert seeds == [2**63 - 1, 0, 2**63 - 1, 0, None, None, 0, 1]


@pytest.mark.parametrize("prompt", ["one two three", ["one two", "three", "four"], ["one BLOCK two", "three"]])
@pytest.mark.parametrize("n", [1, 2])
def test_stream_tells_what_the_whole_holds(
    client: TestClient, read_events: Callable[[str], list[Any]], prompt: Any, n: int
) -> None:
    whole = client.post(URL, json=ask(prompt, n=n)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(URL, json=ask(prompt, n=n, **options))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    assert events[-1] == "[DONE]"
    heads = {(event["id"], event["created"], event["model"], event["object"]) for event in events[:-1]}
    assert len(heads) == 1
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-2])
    endings = {
        event["choices"][0]["index"]: event for event in events[:-2] if event["choices"][0]["finish_reason"] is not None
    }
    texts = texts_of(events)
    for choice in whole["choices"]:
        ending = endings.pop(choice["index"])
        assert ending["choices"][0]["finish_reason"] == choice["finish_reason"]
        assert ending["choices"][0]["text"] == ""
        assert ending["sailguard"]["bank"] == whole["sailguard"]["bank"]
        # Of a blocked one the beginning has been told already; then comes the refusal, as in the whole.
        assert texts.pop(choice["index"]).endswith(choice["text"])
    assert not endings
    assert not texts
    verdicts = [v for event in events[:-2] if "sailguard" in event for v in event["sailguard"]["verdicts"]]
    assert sorted(v["choice"] for v in verdicts) == sorted(v["choice"] for v in whole["sailguard"]["verdicts"])


def test_blocked_choice_is_the_refusal_alone_and_the_others_are_whole(client: TestClient) -> None:
    response = client.post(URL, json=ask(["one two", "three BLOCK four"]))
    first, second = response.json()["choices"]
    assert (first["text"], first["finish_reason"]) == ("one two ", "stop")
    assert (second["text"], second["finish_reason"]) == (REFUSAL, "content_filter")
    block = response.json()["sailguard"]
    assert block["action"] == response.headers["X-Sailguard-Action"] == "block"
    assert [(verdict["choice"], verdict["action"]) for verdict in block["verdicts"]] == [(1, "block")]
    assert "LEAK" not in response.text


def test_nothing_follows_the_deciding_event_of_a_choice(
    client: TestClient, engine: Any, read_events: Callable[[str], list[Any]]
) -> None:
    # The second choice goes on long after the first has ended, and what is said of the first then must not be told.
    prompts = ["a BLOCK b", "c " + "word " * 25]
    for _ in range(5):
        response = client.post(URL, json=ask(prompts, stream=True))
        assert texts_of(read_events(response.text)) == {0: "a " + REFUSAL, 1: prompts[1]}
        assert "LEAK" not in response.text
        assert "LEAK" not in client.post(URL, json=ask(prompts)).text
    assert not engine.overlapped


def test_options_reach_the_engine(client: TestClient, engine: Any) -> None:
    options = {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": ["END", "STOP"], "max_tokens": 2}
    body = client.post(URL, json=ask(**options)).json()
    told = {"max_new_tokens": 2, "temperature": 0.0, "top_p": 0.5, "seed": 7, "stop": ("END", "STOP"), "steer": ()}
    assert engine.calls == [told]
    assert body["choices"][0]["finish_reason"] == "length"
    client.post(URL, json=ask(stop="END"))
    assert engine.calls[-1]["stop"] == ("END",)
    assert engine.calls[-1]["temperature"] == engine.calls[-1]["top_p"] == 1.0


def test_token_limit_is_capped_by_setting_and_by_the_room_that_each_prompt_leaves(
    make_app: Callable[..., Any], engine: Any
) -> None:
    with TestClient(make_app(max_new_tokens=5)) as client:
        client.post(URL, json=ask(["one", "word " * 62], max_tokens=50))
        assert [call["max_new_tokens"] for call in engine.calls] == [5, 2]
        response = client.post(URL, json=ask(["one", "word " * 64]))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert len(engine.calls) == 2, "nothing is begun of a request that is refused"


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt[0]", "invalid_value"),
        ({"prompt": ["one", ""]}, "prompt[1]", "invalid_value"),
        ({"prompt": [1, 2]}, "prompt[0]", "invalid_value"),
        ({"prompt": [["one"]]}, "prompt[0]", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": {"text": "one"}}, "prompt", "invalid_value"),
        ({"prompt": ["one"] * 33}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logprobs": 5}, "logprobs", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"max_completion_tokens": 4}, "max_completion_tokens", "unknown_parameter"),
    ],
)
def test_what_the_server_cannot_honour_is_refused_by_name(
    client: TestClient, engine: Any, changes: dict[str, Any], param: str, code: str
) -> None:
    response = client.post(URL, json=ask() | changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert engine.calls == []


def test_parameters_with_values_that_change_nothing_are_accepted(client: TestClient) -> None:
    neutral = {
        "echo": False,
        "suffix": None,
        "logprobs": None,
        "best_of": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "u",
        "stop": [],
        "n": 1.0,
        "stream": False,
    }
    assert client.post(URL, json=ask(**neutral)).status_code == 200


def test_prompts_as_many_as_allowed_are_answered(client: TestClient) -> None:
    prompts = [f"word{number}" for number in range(32)]
    choices = client.post(URL, json=ask(prompts, n=2)).json()["choices"]
    assert [choice["text"] for choice in choices] == [f"{prompt} " for prompt in prompts for _ in range(2)]


def test_unknown_model_is_404(client: TestClient) -> None:
    response = client.post(URL, json=ask() | {"model": "gpt-4o"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_failure_of_one_choice_fails_the_request_and_ends_the_others(
    client: TestClient, engine: Any, log: io.StringIO, read_events: Callable[[str], list[Any]]
) -> None:
    with TestClient(client.app, raise_server_exceptions=False) as lenient:
        whole = lenient.post(URL, json=ask(["one CRASH", "WAIT two"]))
        streamed = lenient.post(URL, json=ask(["one CRASH", "WAIT two"], stream=True))
    assert whole.status_code == 500
    events = read_events(streamed.text)
    assert events[-1]["error"]["code"] == "internal_error"
    assert "[DONE]" not in events
    assert "secret" not in whole.text + streamed.text + log.getvalue()


@pytest.mark.parametrize("text", ["\ud83d", "\x00", "\U0001f600", " "])
def test_odd_text_is_continued(client: TestClient, text: str) -> None:
    body = json.dumps(ask(text))
    response = client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_completions_share_the_places_of_chats(
    serve: Callable[..., str], engine: Any, chat: Callable[..., Any]
) -> None:
    url = serve(max_concurrent=1, max_queue=0)
    with (
        httpx.Client(base_url=url, timeout=20) as client,
        client.stream("POST", URL, json=ask("WAIT one", stream=True)) as first,
    ):
        assert engine.started.acquire(timeout=10)
        for path, body in ((URL, ask()), ("/v1/chat/completions", chat())):
            refused = httpx.post(url + path, json=body, timeout=20)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
        engine.go.set()
        assert "[DONE]" in first.read().decode()
    assert httpx.post(url + URL, json=ask(), timeout=20).status_code == 200

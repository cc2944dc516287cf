"""The playground tells of every token what the guard saw of it, in order, and nothing that a chat would not show."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from guard.metrics import Metrics
from service.schemas_playground import PlaygroundEvent, event_schema
from tests.service.file_engine import FileEngine

URL = "/v1/playground"
DOMAINS = ["pornography", "politics", "violence", "terror"]
STEER = ["violence=clamp:2"]


def body(content: str = "one two three", **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **options}


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of the documented shape."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [PlaygroundEvent.model_validate(json.loads(line)).model_dump(mode="json") for line in lines]


def play(client: Any, **request: Any) -> list[dict[str, Any]]:
    response = client.post(URL, json=request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def tokens_of(events: list[dict[str, Any]], run: str = "plain", phase: str = "response") -> list[dict[str, Any]]:
    chosen = [e for e in events if e["type"] == "tokens" and (e["run"], e["phase"]) == (run, phase)]
    return [token for event in chosen for token in event["tokens"]]


def text_of(events: list[dict[str, Any]], run: str = "plain", phase: str = "response") -> str:
    return "".join(token["t"] for token in tokens_of(events, run, phase))


def refusal_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_chat_is_told_token_by_token_with_its_prompt(client: TestClient, engine: Any) -> None:
    events = play(client, **body())
    start, *_, end, done = events
    assert {k: start[k] for k in ("type", "model", "bank", "policy", "seed", "runs", "domains", "mode")} == {
        "type": "start",
        "model": engine.model_id,
        "bank": engine.bank_version,
        "policy": engine.policy_version,
        "seed": None,
        "runs": ["plain"],
        "domains": DOMAINS,
        "mode": "chat",
    }
    prompt = tokens_of(events, phase="prompt")
    assert [(token["o"], token["g"]) for token in prompt] == [(False, None), *[(True, 1)] * 3]
    assert text_of(events) == "one two three "
    assert [token["i"] for token in tokens_of(events)] == [0, 1, 2]
    for token in tokens_of(events):
        assert len(token["s"]) == len(DOMAINS)
        assert [activation for _, activation, _ in token["f"]] == sorted((a for _, a, _ in token["f"]), reverse=True)
    assert (end["finish_reason"], end["action"], end["refusal"]) == ("stop", "allow", None)
    assert end["tokens"] == {"prompt": 3, "response": 3}
    assert done == {"type": "done"}
    assert engine.calls[0] == engine.calls[0] | {"temperature": 0.0, "max_new_tokens": 61, "steer": ()}


def test_a_comparison_runs_both_from_one_seed(client: TestClient, engine: Any) -> None:
    events = play(client, **body(steer=STEER, compare=True, temperature=1.0))
    assert events[0]["runs"] == ["plain", "steered"]
    assert text_of(events, "plain") == "one two three "
    assert text_of(events, "steered") == "violence=clamp:2 one two three "
    assert text_of(events, "plain", "prompt") == text_of(events, "steered", "prompt")
    assert sorted(event["run"] for event in events if event["type"] == "end") == ["plain", "steered"]
    plain, steered = engine.calls
    assert (plain["steer"], steered["steer"]) == ((), tuple(STEER))
    assert plain["seed"] == steered["seed"] == events[0]["seed"] is not None


def test_steering_alone_has_one_run(client: TestClient) -> None:
    events = play(client, **body(steer=STEER))
    assert events[0]["runs"] == ["steered"]
    assert {event["run"] for event in events if "run" in event} == {"steered"}


def test_a_blocked_answer_ends_with_the_refusal_and_shows_nothing_of_what_was_stopped(client: TestClient) -> None:
    events = play(client, **body("one two BLOCK three"))
    assert text_of(events) == "one two "
    (end,) = (event for event in events if event["type"] == "end")
    assert (end["finish_reason"], end["action"], end["refusal"]) == (
        "content_filter",
        "block",
        "I cannot help with that.",
    )
    assert [event["verdict"]["action"] for event in events if event["type"] == "verdict"] == ["block"]
    assert events[-1] == {"type": "done"}
    assert "LEAK" not in json.dumps(events)


def test_an_engine_that_fails_ends_the_events_with_an_error_that_quotes_nothing(client: TestClient) -> None:
    events = play(client, **body("one CRASH"))
    assert events[-1]["type"] == "error"
    assert events[-1]["code"] == "internal_error"
    assert "secret" not in json.dumps(events[-1])
    assert text_of(events) == "one "


def test_an_answer_whose_trace_is_not_that_of_its_text_is_an_error(
    client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_observe", lambda *_: None)
    events = play(client, **body())
    assert [event["type"] for event in events] == ["start", "error"]


@pytest.mark.parametrize(("role", "phase"), [("prompt", "prompt"), ("passage", "prompt"), ("response", "response")])
def test_a_text_is_told_as_a_trace_with_all_features(client: TestClient, role: str, phase: str) -> None:
    events = play(client, input="a bird and violence here", role=role)
    assert (events[0]["mode"], events[0]["runs"]) == ("text", ["plain"])
    assert text_of(events, phase=phase) == "a bird and violence here"
    assert all(token["g"] == 0 and len(token["f"]) > 1 for token in tokens_of(events, phase=phase))
    end = events[-2]
    assert (end["action"], end["finish_reason"], end["refusal"]) == ("block", "content_filter", None)
    assert set(end[f"{phase}_scores"]) == set(DOMAINS)
    assert end["tokens"][phase] == 5
    assert [event["verdict"]["domain"] for event in events if event["type"] == "verdict"] == ["violence"]


def test_long_texts_come_in_parts_and_no_longer_than_the_server_takes(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(max_input_tokens=700)) as client:
        events = play(client, input="word " * 1000)
    sizes = [len(event["tokens"]) for event in events if event["type"] == "tokens"]
    assert sizes == [256, 256, 188]
    assert events[-2]["truncated"]


def test_a_verdict_stands_behind_the_token_that_decided(client: TestClient) -> None:
    """The engine's verdicts are on token 3."""
    events = play(client, input="a b c violence e f", role="response")
    kinds = [(event["type"], [t["i"] for t in event.get("tokens", [])]) for event in events[1:-2]]
    assert kinds == [("tokens", [0, 1, 2, 3]), ("verdict", []), ("tokens", [4, 5])]


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        ({}, "messages"),
        ({**body(), "input": "x"}, "messages"),
        (body(compare=True), "compare"),
        (body(role="prompt"), "role"),
        ({"input": None}, "input"),
        ({"input": "x", "steer": STEER}, "steer"),
        ({"input": "x", "max_tokens": 3}, "max_tokens"),
        (body(steer=["violence"]), "steer[0]"),
        (body(steer=["nothing=1"]), "steer"),
        (body(temperature=3), "temperature"),
        (body(max_tokens=0), "max_tokens"),
        (body(seed=-1), "seed"),
        (body(other=1), "other"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_generated(
    client: TestClient, engine: Any, request_body: dict[str, Any], param: str
) -> None:
    status, _, named = refusal_of(client.post(URL, json=request_body))
    assert (status, named) == (400, param)
    assert not engine.calls


def test_a_prompt_without_room_for_an_answer_is_refused(client: TestClient) -> None:
    response = client.post(URL, json=body("word " * 64))
    assert refusal_of(response) == (400, "context_length_exceeded", "messages")


def test_the_servers_cap_holds(make_app: Callable[..., Any], engine: Any) -> None:
    with TestClient(make_app(max_new_tokens=2)) as client:
        events = play(client, **body(max_tokens=50))
    assert text_of(events) == "one two "
    assert events[-2]["finish_reason"] == "length"


def test_a_server_that_only_judges_takes_texts_alone(make_app: Callable[..., Any], bank: Path) -> None:
    served = FileEngine.start(bank, None, Metrics())
    with TestClient(make_app(served)) as client:
        assert refusal_of(client.post(URL, json=body())) == (409, "cannot_generate", "messages")
        events = play(client, input="one two")
    assert [event["type"] for event in events] == ["start", "tokens", "verdict", "tokens", "end", "done"]
    assert events[-2]["action"] == "flag"


def test_a_proxy_takes_texts_alone_whatever_its_own_model_could_do(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(upstream="http://127.0.0.1:9/v1")) as client:
        assert refusal_of(client.post(URL, json=body())) == (409, "cannot_generate", "messages")
        assert play(client, input="one two")[-1] == {"type": "done"}


def test_steering_needs_an_administrators_key_where_there_are_keys(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(api_keys="client-key-for-tests", admin_keys="admin-key-for-tests")) as client:
        asked = [body(), body(steer=STEER), body(steer=STEER, compare=True), {"input": "x"}]
        found = {
            name: [
                client.post(URL, json=each, headers={"Authorization": f"Bearer {name}-key-for-tests"}).status_code
                for each in asked
            ]
            for name in ("client", "admin", "other")
        }
    assert found == {"client": [200, 403, 403, 200], "admin": [200] * 4, "other": [401] * 4}


def test_verdicts_are_put_on_record_with_the_run_they_are_of(make_app: Callable[..., Any], tmp_path: Path) -> None:
    import sqlite3

    file = tmp_path / "audit.db"
    with TestClient(make_app(audit=file, audit_text=True)) as client:
        play(client, **body("one BLOCK", steer=STEER, compare=True))
        play(client, input="violence")
    with sqlite3.connect(file) as database:
        rows = database.execute("select endpoint, choice, action, text from verdicts order by id").fetchall()
    assert sorted(rows) == [
        ("playground", 0, "block", "one "),
        ("playground", 0, "block", "violence"),
        ("playground", 1, "block", "violence=clamp:2 one "),
    ]


def test_without_a_record_nothing_that_follows_is_told(
    make_app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.recording import Recorder

    async def lost(*_: Any, **__: Any) -> bool:
        return False

    with TestClient(make_app()) as client:
        monkeypatch.setattr(Recorder, "record", lost)
        events = play(client, **body())
        assert [event["type"] for event in events] == ["start", "error"]
        assert events[-1]["code"] == "audit_failed"
        assert refusal_of(client.post(URL, json={"input": "violence"})) == (503, "audit_failed", None)


def test_a_request_that_takes_too_long_is_ended(make_app: Callable[..., Any], engine: Any) -> None:
    with TestClient(make_app(request_timeout=0.5)) as client:
        events = play(client, **body("one WAIT two", steer=STEER, compare=True))
        assert events[-1] == {"type": "error", "message": events[-1]["message"], "code": "request_timeout"}
        deadline = time.monotonic() + 10
        while engine.streams_ended < 2:
            assert time.monotonic() < deadline, "a run goes on"
            time.sleep(0.01)


def test_a_client_that_goes_away_ends_both_runs_and_frees_the_place(serve: Callable[..., str], engine: Any) -> None:
    url = serve(max_concurrent=1, max_queue=0)
    with httpx.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", URL, json=body("one WAIT two", steer=STEER, compare=True)) as response:
            lines = (line for line in response.iter_lines() if '"tokens"' in line)
            assert next(lines)
        deadline = time.monotonic() + 10
        while engine.streams_ended < 2 or client.post(URL, json={"input": "x"}).status_code == 429:
            assert time.monotonic() < deadline, "a run goes on"
            time.sleep(0.02)


def test_both_runs_have_one_place_together(serve: Callable[..., str], engine: Any) -> None:
    url = serve(max_concurrent=1, max_queue=4)
    found: list[list[dict[str, Any]]] = []

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            found.append(events_of(client.post(URL, json=body(steer=STEER, compare=True)).text))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [events[-1]["type"] for events in found] == ["done"] * 4


def test_the_schema_of_events_is_in_one_piece() -> None:
    assert "$ref" not in json.dumps(event_schema())
    assert len(event_schema()["oneOf"]) == 6

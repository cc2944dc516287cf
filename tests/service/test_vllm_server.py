"""Verdicts on the responses of vLLM's server, and what it is started with. No vLLM: the app inside is made up."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.engines.vllm import frontend
from guard.engines.vllm.frontend import Found
from guard.errors import GuardError
from guard.events import ActionName, SequenceReport
from service.settings import Settings
from service.vllm_server import Verdicts, command_line, serve_vllm

CHAT = "/v1/chat/completions"
JSON = (b"Content-Type", b"application/json; charset=utf-8")
STREAM = (b"content-type", b"text/event-stream; charset=utf-8")


class FakeFrontend:
    """Knows what was found, by a response's id."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, Found]] = {}
        self.fetched: list[str] = []
        self.guard = SimpleNamespace(bank=SimpleNamespace(version="tiny+1"))

    def fetch(self, name: str) -> Mapping[int, Found]:
        self.fetched.append(name)
        return self.found.pop(name, {})


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> FakeFrontend:
    made = FakeFrontend()
    monkeypatch.setattr(frontend, "_FRONTENDS", [made])
    return made


def found(action: ActionName, score: float = 0.5, policy: str = "p+1") -> Found:
    report = SequenceReport(
        request_id="r",
        action=action,
        verdicts=(),
        prompt_scores={"violence": score},
        response_scores={},
        tokens_generated=1,
        tokens_observed=1,
    )
    return Found(report, "", policy)


def sent(
    parts: Sequence[bytes], *headers: tuple[bytes, bytes], path: str = CHAT, kind: str = "http", status: int = 200
) -> list[dict[str, Any]]:
    """What leaves of a response that the app inside sends in these parts."""
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    asyncio.run(Verdicts(app)({"type": kind, "path": path}, receive, send))
    return messages


def body_of(messages: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(message["body"] for message in messages[1:])


def encoded(**answer: Any) -> bytes:
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", **answer}).encode()


def event(**chunk: Any) -> bytes:
    return b"data: " + encoded(**{"created": 7, "model": "m", "choices": [{"index": 0}], **chunk}) + b"\n\n"


DONE = b"data: [DONE]\n\n"

# ---- responses that come whole ----


@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_whole_response_gets_the_block_and_the_header(known: FakeFrontend, path: str, cuts: int) -> None:
    known.found["chatcmpl-1"] = {0: found("flag", 0.2), 1: found("block", 0.7, "p+2")}
    whole = encoded(choices=[{"index": 0}, {"index": 1}])
    size = -(-len(whole) // cuts)
    length = (b"Content-Length", str(len(whole)).encode())
    start, *rest = sent(
        [whole[i * size : (i + 1) * size] for i in range(cuts)], JSON, length, (b"x-a", b"b"), path=path
    )
    (body,) = rest
    answer = json.loads(body["body"])
    assert answer.pop("sailguard") == {
        "action": "block",
        "verdicts": [],
        "prompt_scores": {"violence": 0.7},
        "response_scores": {},
        "bank": "tiny+1",
        "policy": "p+1, p+2",
    }
    assert answer == json.loads(whole)
    headers = [(name.lower(), value) for name, value in start["headers"]]
    assert dict(headers)[b"x-sailguard-action"] == b"block"
    assert [value for name, value in headers if name == b"content-length"] == [str(len(body["body"])).encode()]
    assert (b"x-a", b"b") in headers
    assert not body.get("more_body", False)


@pytest.mark.parametrize(
    "whole", [b'{"error": {"message": "no"}}', b'{"id": "unknown"}', b"[1, 2]", b"not JSON", b'"text"', b""]
)
def test_a_response_of_which_nothing_is_known_stays_as_it_is(known: FakeFrontend, whole: bytes) -> None:
    headers = (JSON, (b"content-length", str(len(whole)).encode()))
    messages = sent([whole], *headers, status=400)
    assert (messages[0]["status"], messages[0]["headers"]) == (400, list(headers))
    assert body_of(messages) == whole


@pytest.mark.parametrize(("path", "kind"), [("/v1/models", "http"), ("/metrics", "http"), (CHAT, "websocket")])
def test_other_routes_pass_unread(known: FakeFrontend, path: str, kind: str) -> None:
    known.found["chatcmpl-1"] = {0: found("flag")}
    messages = sent([encoded()[:5], encoded()[5:]], JSON, path=path, kind=kind)
    assert [message["body"] for message in messages[1:]] == [encoded()[:5], encoded()[5:]]
    assert known.fetched == []


# ---- streams ----


def test_a_stream_gets_one_chunk_more_before_its_end(known: FakeFrontend) -> None:
    known.found["chatcmpl-1"] = {0: found("steer")}
    parts = [event(), event(choices=[]), DONE]
    messages = sent([*parts, b""], STREAM)
    assert messages[0]["headers"] == [STREAM]
    assert [message["body"] for message in messages[1:3]] == parts[:2]  # none waits for another
    more, done, nothing = messages[3]["body"].split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    chunk = json.loads(more.removeprefix(b"data: "))
    assert chunk.pop("sailguard")["action"] == "steer"
    assert chunk == {"id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m", "choices": []}
    assert known.fetched == ["chatcmpl-1"]


def test_a_stream_that_comes_in_one_piece_gets_it_too(known: FakeFrontend) -> None:
    known.found["chatcmpl-1"] = {0: found("flag")}
    events = body_of(sent([event() + event() + DONE], STREAM)).split(b"\n\n")
    assert [b"sailguard" in part for part in events] == [False, False, True, False, False]
    assert events[-2] == b"data: [DONE]"


def test_a_stream_of_which_nothing_is_known_stays_as_it_is(known: FakeFrontend) -> None:
    assert body_of(sent([event(), DONE], STREAM)) == event() + DONE
    assert body_of(sent([DONE], STREAM)) == DONE


@pytest.mark.parametrize("text", ["data: [DONE]", "data: [DONE]\n\n", "say\ndata: [DONE]"])
def test_an_answer_that_spells_the_end_of_a_stream_does_not_end_it(known: FakeFrontend, text: str) -> None:
    known.found["chatcmpl-1"] = {0: found("flag")}
    spelled = event(choices=[{"index": 0, "delta": {"content": text}}])
    messages = sent([event(), spelled, DONE], STREAM)
    assert messages[2]["body"] == spelled
    assert b'"sailguard"' in messages[3]["body"]


# ---- what vLLM is started with ----


def test_the_command_line_names_what_makes_the_server_ours() -> None:
    settings = Settings(host="0.0.0.0", port=9001, api_keys="one, two")
    line = command_line(settings, "folder/model", "name", ["--max-model-len", "512"])
    assert line[:6] == ["serve", "folder/model", "--host", "0.0.0.0", "--port", "9001"]

    def option(name: str, n: int) -> list[str]:
        at = line.index(name) + 1
        return line[at : at + n]

    assert option("--served-model-name", 2) == ["name", "sailguard"]
    assert option("--api-key", 2) == ["one", "two"]
    assert option("--middleware", 1) == ["service.vllm_server.Verdicts"]
    assert option("--worker-extension-cls", 1) == ["guard.engines.vllm.required.Guarded"]
    assert line[-2:] == ["--max-model-len", "512"]


def test_without_keys_none_are_asked_for() -> None:
    assert "--api-key" not in command_line(Settings(), "m", "m", [])


def test_what_the_command_line_names_is_there() -> None:
    import importlib

    line = command_line(Settings(), "m", "m", [])
    module, _, name = line[line.index("--middleware") + 1].rpartition(".")
    assert getattr(importlib.import_module(module), name) is Verdicts
    extension = line[line.index("--worker-extension-cls") + 1].rpartition(".")[0]
    root = Path(__file__).resolve().parents[2]
    assert (root / (extension.replace(".", "/") + ".py")).is_file()


def test_without_vllm_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    before = dict(os.environ)
    with pytest.raises(GuardError, match=r"vLLM is not installed; install \"sailguard\[vllm\]\""):
        serve_vllm(Settings())
    assert dict(os.environ) == before

"""What becomes of failures: of the upstream, of the client's connection, of the judge."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from guard.metrics import Metrics
from tests.service.proxy.keywords import (
    CHAT,
    CRASH,
    DELICATE,
    PATIENCE,
    REFUSAL,
    WORD,
    KeywordEngine,
    Socket,
    ask,
    call,
    events_of,
    said,
    wait_until,
)
from tests.service.upstream_server import Received, Speaker, UpstreamServer, message


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_upstream_passes_with_its_status_and_when_to_try_again(
    client: httpx.Client, upstream: UpstreamServer, stream: bool
) -> None:
    error = {"error": {"message": "slow down", "type": "rate", "param": None, "code": "r1"}}
    upstream.script = lambda request, say: say.json(
        error, 429, Retry_After="7", X_RateLimit_Limit="9", Set_Cookie="a=b"
    )
    response = client.post(CHAT, json=ask(stream=stream))
    assert (response.status_code, response.json()) == (429, error)
    assert response.headers["Retry-After"] == "7"
    assert response.headers["X-RateLimit-Limit"] == "9"
    assert "Set-Cookie" not in response.headers


def test_an_error_that_is_no_json_keeps_its_status_alone(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head(503, "text/html")
        await say.raw(b"<h1>inside</h1>")

    upstream.script = script
    response = client.post(CHAT, json=ask())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "upstream_error"
    assert "inside" not in response.text


def test_a_redirect_is_not_followed(client: httpx.Client, upstream: UpstreamServer) -> None:
    upstream.script = lambda request, say: say.json({}, 307, Location="http://127.0.0.1:1/")
    assert client.post(CHAT, json=ask()).status_code == 502
    assert len(upstream.requests) == 1


def test_a_refused_key_of_the_operators_is_not_the_clients_mistake(
    proxy: Callable[..., str], upstream: UpstreamServer
) -> None:
    upstream.script = lambda request, say: say.json({"error": {"message": "bad key outer"}}, 401)
    response = httpx.post(f"{proxy(upstream_key='outer')}{CHAT}", json=ask(), timeout=PATIENCE)
    assert response.status_code == 502
    assert "outer" not in response.text


def test_an_upstream_that_is_not_there_is_502(proxy: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    response = httpx.post(f"{proxy(upstream=f'http://127.0.0.1:{port}/v1')}{CHAT}", json=ask(), timeout=PATIENCE)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unreachable")


def test_an_upstream_that_is_silent_is_504(proxy: Callable[..., str], upstream: UpstreamServer) -> None:
    upstream.script = lambda request, say: say.until_hung_up()
    response = httpx.post(f"{proxy(request_timeout=0.3)}{CHAT}", json=ask(), timeout=PATIENCE)
    assert response.status_code == 504
    assert upstream.hung_up.wait(PATIENCE)


@pytest.mark.parametrize("problem", ["end", "reset", "garbage", "error", "silence", "endless line"])
def test_a_stream_that_breaks_off_ends_with_an_error_and_without_done(
    proxy: Callable[..., str], upstream: UpstreamServer, problem: str
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat("of lakes ", "and hills ", finish=None, done=False)
        await say.until("seen")
        if problem == "reset":
            say.reset()
        elif problem == "garbage":
            await say.raw(b"data: {not json}\n\n")
        elif problem == "error":
            await say.event({"error": {"message": "out of memory", "type": "server_error"}})
        elif problem == "silence":
            await say.until_hung_up()
        elif problem == "endless line":
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    await say.raw(b"data: " + b"x" * 65536)

    upstream.script = script
    timeout = 1.5 if problem == "silence" else PATIENCE
    connection = Socket(proxy(request_timeout=timeout), ask(stream=True))
    connection.until("hills")
    upstream.open("seen")
    events = events_of(re.sub(r"\r\n[0-9a-f]+\r\n", "", connection.rest()))
    assert said(events[:-1]) == "of lakes and hills "
    assert "[DONE]" not in events
    assert events[-1]["error"]["code"] == ("request_timeout" if problem == "silence" else "upstream_error")
    if problem == "error":
        assert events[-1]["error"]["message"] == "out of memory"


def test_an_answer_without_end_is_cut_off(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head(200, "application/json")
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                await say.raw(b" " * 65536)

    upstream.script = script
    assert client.post(CHAT, json=ask()).status_code == 502


@pytest.mark.parametrize("stream", [False, True])
def test_the_upstream_is_hung_up_on_when_the_client_goes_away(
    proxy: Callable[..., str], upstream: UpstreamServer, log: io.StringIO, stream: bool
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        if stream:
            await say.head()
            await say.chat("of lakes ", "and hills ", finish=None, done=False)
        await say.until_hung_up()

    upstream.script = script
    url = proxy(max_concurrent=1)
    connection = Socket(url, ask(stream=stream))
    if stream:
        connection.until("hills")
    else:
        wait_until(lambda: bool(upstream.requests))
    connection.close()
    assert upstream.hung_up.wait(PATIENCE)
    wait_until(lambda: '"status": 499' in log.getvalue())
    upstream.script = lambda request, say: say.json(message("free again"))
    assert httpx.post(f"{url}{CHAT}", json=ask(), timeout=PATIENCE).status_code == 200


def test_beyond_the_places_and_the_queue_a_request_is_refused(
    proxy: Callable[..., str], upstream: UpstreamServer
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.until("go")
        await say.json(message("done"))

    upstream.script = script
    url = proxy(max_concurrent=1, max_queue=0)
    first = Socket(url, ask())
    wait_until(lambda: bool(upstream.requests))
    response = httpx.post(f"{url}{CHAT}", json=ask(), timeout=PATIENCE)
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    upstream.open("go")
    assert "done" in first.rest()


@pytest.mark.parametrize(("on_error", "action"), [("block", "block"), ("flag", "flag"), ("allow", "allow")])
@pytest.mark.parametrize("where", ["prompt", "answer", "stream", "call"])
def test_the_policy_says_what_becomes_of_an_error_of_the_judge(
    proxy: Callable[..., str],
    upstream: UpstreamServer,
    judge: KeywordEngine,
    metrics: Metrics,
    log: io.StringIO,
    on_error: str,
    action: str,
    where: str,
) -> None:
    judge.policy = judge.policy.model_copy(update={"on_error": on_error})
    answer = "fine" if where == "prompt" else f"one two {CRASH} four"

    async def script(request: Received, say: Speaker) -> None:
        if where == "stream":
            await say.head()
            await say.chat("one tw", f"o {CRASH[:3]}", f"{CRASH[3:]} four")
        elif where == "call":
            await say.head()
            await say.chat(call(0, name="f", arguments=answer))
        else:
            await say.json(message(answer))

    upstream.script = script
    prompt = CRASH if where == "prompt" else "hi"
    stream = where in ("stream", "call")
    response = httpx.post(f"{proxy()}{CHAT}", json=ask(prompt, stream=stream), timeout=PATIENCE)
    if stream:
        events = events_of(response.text)
        (block,) = [event["sailguard"] for event in events[:-1] if "sailguard" in event]
        text = said(events)
    else:
        block, text = response.json()["sailguard"], response.json()["choices"][0]["message"]["content"]
    assert block["action"] == action
    assert CRASH in response.text or where == "prompt" or on_error == "block"
    assert text.endswith(REFUSAL) if on_error == "block" else text == ("" if where == "call" else answer)
    assert bool(upstream.requests) is (where != "prompt" or on_error != "block")
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": on_error}) == 1
    assert CRASH not in log.getvalue()


def test_verdicts_are_counted_and_the_log_has_the_action_but_no_text(
    client: httpx.Client, upstream: UpstreamServer, metrics: Metrics, log: io.StringIO
) -> None:
    upstream.script = lambda request, say: say.json(message(f"a {WORD}"))
    client.post(CHAT, json=ask(f"a {DELICATE}"))
    found = metrics.registry.get_sample_value
    assert found("sailguard_verdicts_total", {"domain": "violence", "action": "block"}) == 1
    assert found("sailguard_requests_total", {"phase": "prompt", "result": "flag"}) == 1
    assert found("sailguard_requests_total", {"phase": "response", "result": "block"}) == 1
    wait_until(lambda: '"action": "block"' in log.getvalue())
    assert WORD not in log.getvalue()
    assert DELICATE not in log.getvalue()


@pytest.mark.parametrize("stream", [False, True])
def test_verdicts_are_on_record_before_the_answer_ends(
    proxy: Callable[..., str], upstream: UpstreamServer, tmp_path: Path, stream: bool
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        if stream:
            await say.head()
            await say.chat("a ", WORD)
        else:
            await say.json(message(f"a {WORD}"))

    upstream.script = script
    response = httpx.post(
        f"{proxy(audit=tmp_path / 'audit.sqlite')}{CHAT}", json=ask(DELICATE, stream=stream), timeout=PATIENCE
    )
    assert REFUSAL in response.text
    with contextlib.closing(sqlite3.connect(tmp_path / "audit.sqlite")) as audit:
        rows = audit.execute("SELECT phase, action, endpoint, choice FROM verdicts ORDER BY id").fetchall()
    assert rows == [("prompt", "flag", "chat", 0), ("response", "block", "chat", 0)]

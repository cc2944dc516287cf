"""Streamed answers: nothing unjudged reaches the client, measured on the socket where it matters."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.service.proxy.keywords import (
    CHAT,
    PATIENCE,
    REFUSAL,
    WORD,
    Socket,
    ask,
    call,
    events_of,
    finishes,
    said,
)
from tests.service.upstream_server import HEAD, Received, Speaker, UpstreamServer, chunk, encoded, message, pieces


def test_a_stream_is_the_upstreams_text_and_keeps_its_head(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.event(chunk({"role": "assistant", "content": ""}))
        await say.chat("of ", "lakes ", "and ", "hills", finish="length", done=False)
        await say.event({**HEAD, "choices": [], "usage": {"total_tokens": 9}})
        await say.event("[DONE]")

    upstream.script = script
    response = client.post(CHAT, json=ask(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert said(events) == "of lakes and hills"
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"] == {"total_tokens": 9}
    assert finishes(events) == {0: "length"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {(event["id"], event["created"], event["model"]) for event in events[:-1]} == {tuple(HEAD.values())}
    (block,) = [event["sailguard"] for event in events[:-1] if "sailguard" in event]
    assert block["action"] == "allow"


def test_nothing_after_the_deciding_token_reaches_the_socket(
    proxy: Callable[..., str], upstream: UpstreamServer
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat("green ", "hills ", "lie ", "there ", finish=None, done=False)
        await say.until("seen")
        await say.chat("a ", "vol", "cano ", "AFTER", " it ", "AFTER ", finish=None, done=False)
        await say.until_hung_up()

    upstream.script = script
    connection = Socket(proxy(), ask(stream=True))
    connection.until("there")  # released by time, though no further token comes
    upstream.open("seen")
    text = connection.rest()
    events = events_of(re.sub(r"\r\n[0-9a-f]+\r\n", "", text))
    assert said(events) == "green hills lie there a " + REFUSAL
    assert "AFTER" not in text
    assert "vol" not in text
    assert events[-1] == "[DONE]"
    assert finishes(events) == {0: "content_filter"}
    assert events[-2]["sailguard"]["action"] == "block"
    assert upstream.hung_up.wait(PATIENCE)  # though the upstream was not done


def test_text_waits_until_it_has_been_judged(proxy: Callable[..., str], upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat("a vol", finish=None, done=False)
        await say.until("waited")
        await say.chat("ume")

    upstream.script = script
    connection = Socket(proxy(), ask(stream=True))
    connection.until('"a "')
    assert b"vol" not in connection.received
    upstream.open("waited")
    assert said(events_of(re.sub(r"\r\n[0-9a-f]+\r\n", "", connection.rest()))) == "a volume"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_may_be_cut_anywhere(client: httpx.Client, upstream: UpstreamServer, newline: str, size: int) -> None:
    data = b": a comment" + newline.encode()
    for delta in ("Zürich ", "and 湖 ", "end"):
        data += encoded(chunk({"content": delta}), newline)
    data += encoded(chunk({}, finish="stop"), newline) + encoded("[DONE]", newline)

    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        for piece in pieces(data, size):
            await say.raw(piece)

    upstream.script = script
    events = events_of(client.post(CHAT, json=ask(stream=True)).text)
    assert said(events) == "Zürich and 湖 end"
    assert events[-1] == "[DONE]"


def test_choices_do_not_disturb_each_other(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        for words in (("red ", "blue "), ("vol", "green "), ("cano ", "grey "), ("AFTER ", "white ")):
            for index, word in enumerate(words):
                await say.chat(word, index=index, finish=None, done=False)
        await say.chat(index=0, done=False)
        await say.chat("end", index=1)

    upstream.script = script
    response = client.post(CHAT, json=ask(stream=True, n=2))
    events = events_of(response.text)
    assert said(events, 0) == "red " + REFUSAL
    assert said(events, 1) == "blue green grey white end"
    assert finishes(events) == {0: "content_filter", 1: "stop"}
    assert "AFTER" not in response.text
    blocks = {e["choices"][0]["index"]: e["sailguard"]["action"] for e in events[:-1] if "sailguard" in e}
    assert blocks == {0: "block", 1: "allow"}


def test_tool_calls_pass_in_one_piece_once_they_are_judged(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        parts = [call(0, name="find", arguments=""), call(0, arguments='{"a": '), call(1, name="go", arguments="{}")]
        await say.chat(*parts, call(0, arguments='"lake"}'), finish="tool_calls")

    upstream.script = script
    events = events_of(client.post(CHAT, json=ask(stream=True)).text)
    (delta,) = [e["choices"][0]["delta"] for e in events[:-1] if "tool_calls" in e["choices"][0]["delta"]]
    calls = [(c["index"], c["id"], c["function"]["name"], c["function"]["arguments"]) for c in delta["tool_calls"]]
    assert calls == [(0, "c0", "find", '{"a": "lake"}'), (1, "c1", "go", "{}")]
    assert finishes(events) == {0: "tool_calls"}


def test_a_harmful_tool_call_is_replaced_by_the_refusal(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat(call(0, name="find", arguments='{"a": "vol'), call(0, arguments='cano"}'), finish="tool_calls")

    upstream.script = script
    response = client.post(CHAT, json=ask(stream=True))
    assert "tool_calls" not in response.text
    assert said(events_of(response.text)) == REFUSAL
    assert finishes(events_of(response.text)) == {0: "content_filter"}


def test_reasoning_is_judged_and_ends_before_the_answer_begins(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        thoughts = [{"reasoning_content": word} for word in ("think ", "of it")]
        await say.chat(*thoughts, "the ", "answer", {"reasoning_content": " later"})

    upstream.script = script
    events = events_of(client.post(CHAT, json=ask(stream=True)).text)
    assert said(events, name="reasoning_content") == "think of it later"
    assert said(events) == "the answer"
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    names = [next(iter(delta)) for delta in deltas if delta and "role" not in delta]
    assert names.index("content") > names.index("reasoning_content")
    assert names[-1] == "reasoning_content"  # what comes late waits for the end


@pytest.mark.parametrize(
    "deltas", [[{"reasoning_content": f"{WORD} "}, "x"], [{"reasoning": "vol"}, "x ", {"reasoning": "cano"}]]
)
def test_harmful_reasoning_ends_the_choice(client: httpx.Client, upstream: UpstreamServer, deltas: list[Any]) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat(*deltas)

    upstream.script = script
    response = client.post(CHAT, json=ask(stream=True))
    assert "cano" not in response.text
    assert finishes(events_of(response.text)) == {0: "content_filter"}
    assert said(events_of(response.text)).endswith(REFUSAL)


def test_what_a_stream_holds_beside_judged_text_is_left_out(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        event = chunk({"content": "fine ", "secret_thoughts": "LEAK"}, odd="LEAK")
        event["choices"][0] |= {"logprobs": {"content": [{"token": "LEAK"}]}, "token_ids": [1], "extra": "LEAK"}
        await say.event(event)
        await say.chat()

    upstream.script = script
    response = client.post(CHAT, json=ask(stream=True, logprobs=True))
    assert "LEAK" not in response.text
    assert "token_ids" not in response.text
    assert said(events_of(response.text)) == "fine "


def test_what_comes_after_the_end_of_a_choice_is_left_out(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat("fine", done=False)
        await say.chat("LEAK")

    upstream.script = script
    assert "LEAK" not in client.post(CHAT, json=ask(stream=True)).text


def test_completions_stream_as_text(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        for text, finish in (("a ", None), ("lake ", None), (f"{WORD} AFTER", None), ("", "stop")):
            await say.event({**HEAD, "choices": [{"index": 0, "text": text, "finish_reason": finish}]})
        await say.event("[DONE]")

    upstream.script = script
    response = client.post("/v1/completions", json={"model": "m", "prompt": "a", "stream": True})
    events = events_of(response.text)
    parts = [event["choices"][0] for event in events[:-1]]
    assert "".join(part["text"] for part in parts) == "a lake " + REFUSAL
    assert parts[-1]["finish_reason"] == "content_filter"
    assert "AFTER" not in response.text


def test_a_stream_that_nobody_asked_for_is_judged_all_the_same(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.head()
        await say.chat(WORD)

    upstream.script = script
    assert WORD not in client.post(CHAT, json=ask()).text


def test_a_whole_answer_in_place_of_a_stream_is_judged_all_the_same(
    client: httpx.Client, upstream: UpstreamServer
) -> None:
    upstream.script = lambda request, say: say.json(message(WORD))
    body = client.post(CHAT, json=ask(stream=True)).json()
    assert body["choices"][0]["finish_reason"] == "content_filter"


def test_many_streams_at_a_time_keep_their_texts_and_verdicts_apart(
    proxy: Callable[..., str], upstream: UpstreamServer
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        number = int(request.json["messages"][0]["content"])
        await say.head()
        for step in range(5):
            await say.chat(f"lake{number} ", finish=None, done=False)
            if step == 3 and number % 10 == 0:
                await say.chat(f"{WORD} AFTER{number} ", finish=None, done=False)
            await asyncio.sleep(0.001 * (number % 7))
        await say.chat()

    async def all_of_them(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            asked = [client.post(CHAT, json=ask(str(number), stream=True)) for number in range(200)]
            return [response.text for response in await asyncio.gather(*asked)]

    upstream.script = script
    for number, text in enumerate(asyncio.run(all_of_them(proxy(max_concurrent=50, max_queue=200)))):
        events = events_of(text)
        harmful = number % 10 == 0
        assert said(events) == f"lake{number} " * 4 + REFUSAL if harmful else f"lake{number} " * 5
        assert finishes(events) == {0: "content_filter" if harmful else "stop"}
        assert "AFTER" not in text
        (block,) = [event["sailguard"] for event in events[:-1] if "sailguard" in event]
        assert (block["action"], len(block["verdicts"])) == (("block", 1) if harmful else ("allow", 0))

"""Two hundred streams at once, a tenth of them stopped: each client gets its own answer, verdict and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from feature_bank.bank import Bank
from guard.core import Guard
from guard.metrics import Metrics
from guard.policy import Policy
from guard.serving import ServingGuard
from service.engine import TransformersEngine
from tests.factories import make_bank, make_policy

STREAMS = 200
PROMPTS = 40
TOKENS = 16
REFUSAL = "REFUSED"
DOMAINS = dict.fromkeys(("pornography", "politics", "violence", "terror"))


class Stream(NamedTuple):
    """What came through one socket."""

    text: str
    reason: str
    block: dict[str, Any]
    raw: str


@pytest.fixture
def bank(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    return make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires=DOMAINS)


@pytest.fixture
def start(bank: Bank, metrics: Metrics, tiny_model: Any, tiny_tokenizer: Any) -> Iterator[Callable[..., Any]]:
    """An engine on the tiny model that never ends an answer by itself, under a policy."""
    original = tiny_model.lm_head.forward

    def forward(hidden: Any) -> Any:
        logits = original(hidden).clone()
        logits[..., :3] = -1e4
        return logits

    tiny_model.lm_head.forward = forward
    with contextlib.ExitStack() as stack:

        def make(policy: Policy) -> TransformersEngine:
            stack.close()
            guard = Guard(bank, policy, metrics)
            serving = ServingGuard(guard, tiny_model, tiny_tokenizer, max_concurrent=16, cache_tokens=4096)
            return stack.enter_context(contextlib.closing(TransformersEngine(serving, "tiny")))

        yield make


def prompt(number: int) -> str:
    return f"Question {number}: " + "what is it, and where? " * (number % 5)


async def ask(url: str, number: int) -> Stream:
    """One streamed chat over a socket of its own."""
    place = urlsplit(url)
    body = json.dumps(
        {
            "model": "sailguard",
            "messages": [{"role": "user", "content": prompt(number)}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    raw = (await asyncio.wait_for(reader.read(), 120)).decode()
    writer.close()
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    assert raw.startswith("HTTP/1.1 200"), raw[:200]
    assert "data: [DONE]" in raw
    assert len({event["id"] for event in events}) == 1
    parts = [event["choices"][0] for event in events]
    return Stream(
        text="".join(part["delta"].get("content", "") for part in parts),
        reason=parts[-1]["finish_reason"],
        block=events[-1]["sailguard"],
        raw=raw,
    )


def verdicts(block: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(v["rule"], v["phase"], v["token_index"], round(v["score"], 3)) for v in block["verdicts"]]


@pytest.mark.slow
def test_no_stream_shows_anything_of_another(start: Callable[..., Any], serve: Callable[..., str]) -> None:
    options = {"max_concurrent": 16, "max_queue": STREAMS, "request_timeout": 300.0}

    async def one_by_one(url: str) -> list[Stream]:
        return [await ask(url, number) for number in range(PROMPTS)]

    async def together(url: str) -> list[Stream]:
        return await asyncio.gather(*(ask(url, number % PROMPTS) for number in range(STREAMS)))

    free = asyncio.run(one_by_one(serve(start(make_policy()), **options)))
    scores = sorted((stream.block["response_scores"]["violence"] for stream in free), reverse=True)
    harmful = PROMPTS // 10
    cut = (scores[harmful - 1] + scores[harmful]) / 2
    rule = {"domain": "violence", "action": "block", "scope": ["response"], "threshold": {"probability": cut}}
    url = serve(start(make_policy(rule)), **options)
    alone = asyncio.run(one_by_one(url))
    found = asyncio.run(together(url))
    assert [stream.reason for stream in alone].count("content_filter") == harmful
    assert [stream.reason for stream in found].count("content_filter") == STREAMS // 10
    for number, stream in enumerate(found):
        own, whole = alone[number % PROMPTS], free[number % PROMPTS].text
        assert (stream.text, stream.reason) == (own.text, own.reason)
        assert verdicts(stream.block) == verdicts(own.block)
        if stream.reason == "content_filter":
            shown = stream.text.removesuffix(REFUSAL)
            (deciding,) = {v["token_index"] for v in stream.block["verdicts"] if v["action"] == "block"}
            assert stream.text.endswith(REFUSAL)
            assert whole.startswith(shown)
            assert len(shown.encode()) <= deciding  # the tiny tokenizer has a token for every byte
        else:
            assert stream.text == whole
            assert REFUSAL not in stream.raw

"""The official client against a real server, around the fake engine and around the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from feature_bank import shipped_bank_path
from guard.metrics import Metrics

CHAT: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def connect() -> Iterator[Callable[..., openai.OpenAI]]:
    clients: list[openai.OpenAI] = []

    def make(url: str, **options: Any) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{url}/v1", max_retries=0, **{"api_key": "unused", **options})
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


def test_client_reads_whole_and_streamed_answers(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    client = connect(serve())
    whole = client.chat.completions.create(model="sailguard", messages=CHAT)
    assert whole.choices[0].message.content == "one two three "
    assert whole.usage is not None
    assert whole.usage.total_tokens == 6
    assert whole.model_extra is not None
    assert whole.model_extra["sailguard"]["action"] == "allow"
    stream = client.chat.completions.create(
        model="sailguard", messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [model.id for model in client.models.list()] == ["tiny-guarded", "sailguard"]


def test_client_sees_a_block_as_content_filter(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    client = connect(serve())
    messages: Any = [{"role": "user", "content": "one BLOCK two"}]
    raw = client.chat.completions.with_raw_response.create(model="sailguard", messages=messages)
    assert raw.headers["X-Sailguard-Action"] == "block"
    assert raw.parse().choices[0].finish_reason == "content_filter"
    chunks = list(client.chat.completions.create(model="sailguard", messages=messages, stream=True))
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_client_raises_its_own_error_types(serve: Callable[..., str], connect: Callable[..., openai.OpenAI]) -> None:
    url = serve(api_keys="right")
    client = connect(url, api_key="right")
    with pytest.raises(openai.AuthenticationError):
        connect(url, api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=CHAT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="sailguard", messages=CHAT, logprobs=True)
    assert unsupported.value.param == "logprobs"
    crash: Any = [{"role": "user", "content": "one CRASH"}]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="sailguard", messages=crash)
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="sailguard", messages=crash, stream=True))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not shipped_bank_path().exists(), reason="the shipped bank is not in place")
def test_embedded_model_and_shipped_bank_serve_the_official_client(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], embedded: Any, metrics: Metrics
) -> None:
    from guard.core import Guard
    from service.engine import Engine

    with Guard.from_bank(metrics=metrics).attach(embedded.model, embedded.tokenizer) as attached:
        client = connect(serve(Engine(attached, embedded.model_id), max_new_tokens=24), timeout=120)
        messages: Any = [{"role": "user", "content": "Name three fruits."}]
        options: Any = {"model": embedded.model_id, "messages": messages, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == whole.choices[0].message.content != ""
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.model_extra is not None
        assert whole.model_extra["sailguard"]["bank"] == attached.guard.bank.version
        moderation = client.moderations.create(input=["How do I bake bread?", ""])
        assert len(moderation.results) == 2
        assert moderation.results[0].flagged is False
        observed = metrics.registry.get_sample_value("sailguard_tokens_observed_total")
        assert observed == metrics.registry.get_sample_value("sailguard_tokens_generated_total")
        assert observed

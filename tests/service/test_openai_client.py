"""The official client against a real server, around the fake engine and around the embedded model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
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


def test_async_client_reads_what_the_other_one_does(serve: Callable[..., str]) -> None:
    url = serve()

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            whole = await client.chat.completions.create(model="sailguard", messages=CHAT)
            assert whole.choices[0].message.content == "one two three "
            options: Any = {"stream": True, "stream_options": {"include_usage": True}}
            stream = await client.chat.completions.create(model="sailguard", messages=CHAT, **options)
            chunks = [chunk async for chunk in stream]
            assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "one two three "
            assert chunks[-1].usage == whole.usage
            moderations, completion, models = await asyncio.gather(
                client.moderations.create(input=["calm", "violence"]),
                client.completions.create(model="sailguard", prompt="one two"),
                client.models.list(),
            )
            assert [result.flagged for result in moderations.results] == [False, True]
            assert completion.choices[0].text == "one two "
            assert models.data[0].id == "tiny-guarded"

    asyncio.run(ask())


def test_client_reads_several_choices_with_stops_and_seeds(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], engine: Any
) -> None:
    client = connect(serve())
    options: Any = {"n": 3, "seed": 5, "stop": ["END"], "temperature": 0.5, "max_completion_tokens": 2}
    whole = client.chat.completions.create(model="sailguard", messages=CHAT, **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    assert [call["seed"] for call in engine.calls] == [5, 6, 7]
    assert {call["stop"] for call in engine.calls} == {("END",)}
    texts = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(model="sailguard", messages=CHAT, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices] == ["one two "] * 3


def test_client_accumulates_a_stream_by_itself(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    """The client's own helper refuses chunks whose order or shape it does not know."""
    client = connect(serve())
    with client.chat.completions.stream(
        model="sailguard", messages=CHAT, stream_options={"include_usage": True}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds.count("content.done") == 1
    assert final.choices[0].message.content == "one two three "
    assert final.usage is not None
    assert final.usage.total_tokens == 6


def test_client_reads_completions_whole_and_streamed(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    client = connect(serve())
    whole = client.completions.create(model="sailguard", prompt=["one two", "three BLOCK"], n=2)
    assert [choice.text for choice in whole.choices] == ["one two "] * 2 + ["I cannot help with that."] * 2
    assert [choice.finish_reason for choice in whole.choices] == ["stop"] * 2 + ["content_filter"] * 2
    chunks = list(client.completions.create(model="sailguard", prompt="one two", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two "
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_client_reads_moderations_and_models(serve: Callable[..., str], connect: Callable[..., openai.OpenAI]) -> None:
    client = connect(serve())
    (single,) = client.moderations.create(input="violence", model="sailguard").results
    several = client.moderations.create(input=["violence", "calm"]).results
    assert several[0] == single
    assert (single.flagged, single.categories.violence, several[1].flagged) == (True, True, False)
    assert single.categories.harassment is False
    raw = client.moderations.with_raw_response.create(input=["calm", "violence"])
    assert raw.headers["X-Sailguard-Action"] == "block"
    assert raw.headers["X-Request-Id"].startswith("req_")
    assert raw.parse().results[1].flagged
    assert client.models.retrieve("sailguard").id == "sailguard"
    assert client.models.retrieve("sailguard").owned_by == "sailguard"


def test_every_refusal_is_the_exception_that_its_status_means(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    client = connect(serve(max_body_bytes=2048))
    long: Any = [{"role": "user", "content": "word " * 80}]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="sailguard", messages=long)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    assert error.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="sailguard", prompt=[])
    assert error.value.param == "prompt"
    with pytest.raises(openai.BadRequestError):
        client.moderations.create(input=[])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="sailguard", input="one", encoding_format="float")
    with pytest.raises(openai.APIStatusError) as large:
        client.moderations.create(input="word " * 1000)
    assert (large.value.status_code, large.value.code) == (413, "request_too_large")
    with pytest.raises(openai.PermissionDeniedError) as closed:
        client.get("/../admin/bank", cast_to=object)
    assert closed.value.code in ("admin_closed", "host_not_allowed")


def test_server_that_is_not_ready_is_an_internal_server_error_that_is_tried_again(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI]
) -> None:
    def load(_: object) -> Any:
        raise ValueError("no model")

    client = connect(serve(load))
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="sailguard", messages=CHAT)
    assert (error.value.status_code, error.value.code) == (503, "not_ready")
    assert int(error.value.response.headers["Retry-After"]) >= 1


def test_client_waits_as_long_as_a_full_server_says_and_then_gets_its_answer(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(max_queue=0, max_concurrent=1)
    waiting: Any = [{"role": "user", "content": "WAIT one"}]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        engine.go.set()
        first.join(10)

    client = connect(url)
    first = threading.Thread(target=lambda: client.chat.completions.create(model="sailguard", messages=waiting))
    first.start()
    try:
        assert engine.started.acquire(timeout=10)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="sailguard", messages=CHAT)
        told = float(refused.value.response.headers["Retry-After"])
        monkeypatch.setattr("openai._base_client.time.sleep", sleep)
        patient = client.with_options(max_retries=2)
        answer = patient.chat.completions.create(model="sailguard", messages=CHAT)
    finally:
        engine.go.set()
        first.join(10)
    assert answer.choices[0].message.content == "one two three "
    assert slept == [told]
    assert not engine.overlapped


def test_request_beyond_its_time_ends_as_a_timeout_of_the_server(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], engine: Any, metrics: Metrics
) -> None:
    client = connect(serve(request_timeout=0.3, max_concurrent=1, max_queue=0))
    waiting: Any = [{"role": "user", "content": "one WAIT two"}]
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="sailguard", messages=waiting)
    assert (error.value.status_code, error.value.code) == (504, "request_timeout")
    heard: list[Any] = []
    stream = client.chat.completions.create(model="sailguard", messages=waiting, stream=True)
    with pytest.raises(openai.APIError, match="longer than"):
        heard.extend(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in heard) == "one "
    timeouts = metrics.registry.get_sample_value("sailguard_refused_total", {"reason": "timeout"})
    assert timeouts == 2
    # Both have left their place.
    assert client.chat.completions.create(model="sailguard", messages=CHAT).choices[0].finish_reason == "stop"


def test_client_that_gives_up_frees_its_place(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], engine: Any
) -> None:
    client = connect(serve(max_concurrent=1, max_queue=0))
    waiting: Any = [{"role": "user", "content": "one WAIT two"}]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="sailguard", messages=waiting)
    patient = client.with_options(max_retries=8)
    assert patient.chat.completions.create(model="sailguard", messages=CHAT).choices[0].finish_reason == "stop"
    assert not engine.go.is_set()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not shipped_bank_path().exists(), reason="the shipped bank is not in place")
def test_embedded_model_and_shipped_bank_serve_the_official_client(
    serve: Callable[..., str], connect: Callable[..., openai.OpenAI], embedded: Any, metrics: Metrics
) -> None:
    from guard.core import Guard
    from guard.serving import ServingGuard
    from service.engine import TransformersEngine

    serving = ServingGuard(Guard.from_bank(metrics=metrics), embedded.model, embedded.tokenizer)
    with contextlib.closing(TransformersEngine(serving, embedded.model_id)) as engine:
        client = connect(serve(engine, max_new_tokens=24), timeout=120)
        messages: Any = [{"role": "user", "content": "Name three fruits."}]
        options: Any = {"model": embedded.model_id, "messages": messages, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == whole.choices[0].message.content != ""
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.model_extra is not None
        assert whole.model_extra["sailguard"]["bank"] == engine.bank_version
        moderation = client.moderations.create(input=["How do I bake bread?", ""])
        assert len(moderation.results) == 2
        assert moderation.results[0].flagged is False
        observed = metrics.registry.get_sample_value("sailguard_tokens_observed_total")
        assert observed == metrics.registry.get_sample_value("sailguard_tokens_generated_total")
        assert observed

"""Lists of models, and the official client through the proxy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.service.proxy.keywords import (
    REFUSAL,
    WORD,
)
from tests.service.upstream_server import Received, Speaker, UpstreamServer, message


def test_models_pass_through(client: httpx.Client, upstream: UpstreamServer) -> None:
    async def script(request: Received, say: Speaker) -> None:
        await say.json({"object": "list", "data": [], "asked": request.path})

    upstream.script = script
    assert client.get("/v1/models").json()["asked"] == "/v1/models"
    assert client.get("/v1/models/org/name").json()["asked"] == "/v1/models/org/name"
    assert client.get("/v1/models/a%3Fb").json()["asked"] == "/v1/models/a%3Fb"


@pytest.mark.parametrize("model", ["%2e%2e/metrics", "a/%2e%2e/%2e%2e/metrics", "%2e"])
def test_no_model_name_leads_elsewhere(client: httpx.Client, upstream: UpstreamServer, model: str) -> None:
    assert client.get(f"/v1/models/{model}").status_code == 404
    assert upstream.requests == []


def test_the_official_client_reads_answers_streams_and_blocks(
    proxy: Callable[..., str], upstream: UpstreamServer
) -> None:
    async def script(request: Received, say: Speaker) -> None:
        if not request.json.get("stream"):
            await say.json(message("of lakes"))
            return
        await say.head()
        last = request.json["messages"][-1]["content"]
        await say.chat("of ", "lakes", f" {WORD}" if "more" in last else "", finish="stop")

    upstream.script = script
    with openai.OpenAI(base_url=f"{proxy()}/v1", api_key="unused", max_retries=0) as client:
        create: Any = client.chat.completions.create
        messages = [{"role": "user", "content": "tell"}]
        assert create(model="m", messages=messages).choices[0].message.content == "of lakes"
        chunks = list(create(model="m", messages=messages, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "of lakes"
        more = [{"role": "user", "content": "tell more"}]
        chunks = list(create(model="m", messages=more, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == f"of lakes {REFUSAL}"
        assert chunks[-1].choices[0].finish_reason == "content_filter"
        blocked = create(model="m", messages=[{"role": "user", "content": WORD}])
        assert blocked.choices[0].finish_reason == "content_filter"
        upstream.script = lambda request, say: say.json({"error": {"message": "no such model", "code": "c"}}, 404)
        with pytest.raises(openai.NotFoundError, match="no such model"):
            create(model="m", messages=messages)

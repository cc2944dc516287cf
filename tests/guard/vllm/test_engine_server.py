"""vLLM's own server with the guard inside, as a client meets it: over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.guard.vllm.engine_fixtures import needs_vllm, tenants
from tests.guard.vllm.engine_process import ROOT, environment
from tests.guard.vllm.engine_prompts import HARMLESS, POLITICS, TERROR

__all__ = ["tenants"]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
KEY = "a-key-for-this-test"


def serve(log: Path, guard: dict[str, str], *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server that has come up, and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--engine", "vllm", "--port", str(port), "--"]
    options = ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options, *more], stdout=file, stderr=file, cwd=ROOT, env=environment(guard)
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-4000:])
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(1)
    process.kill()
    raise RuntimeError(f"not ready in time:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tenants: Path) -> Iterator[str]:
    guard = {"SAILGUARD_TENANTS": str(tenants), "SAILGUARD_API_KEYS": KEY}
    process, url = serve(tmp_path_factory.mktemp("server") / "log", guard)
    yield url
    stop(process)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def counted(url: str) -> dict[str, float]:
    """vLLM's page of metrics: ours stand among its own."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line and line[0] != "#"]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def ask(prompt: str, **options: Any) -> dict[str, Any]:
    return {
        "model": "sailguard",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,
        "max_tokens": 16,
        **options,
    }


def test_an_answer_carries_its_verdict_in_the_body_and_in_a_header(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ask(POLITICS))
    block = json.loads(raw.text)["sailguard"]

    assert raw.headers["X-Sailguard-Action"] == block["action"] == "flag"
    assert {verdict["domain"] for verdict in block["verdicts"]} == {"politics"}
    assert raw.parse().choices[0].message.content


def test_a_blocked_answer_is_the_refusal_with_finish_reason_content_filter(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**ask(TERROR)).choices
    assert choice.finish_reason == "content_filter"
    assert choice.message.content is not None
    assert choice.message.content.startswith("I can't continue")


def test_a_stream_ends_with_its_verdict_and_a_blocked_one_shows_nothing_but_the_refusal(
    client: openai.OpenAI,
) -> None:
    for prompt, action in ((HARMLESS[1], "allow"), (TERROR, "block")):
        chunks = list(client.chat.completions.create(**ask(prompt, stream=True)))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        blocks = [c.model_extra["sailguard"] for c in chunks if c.model_extra and "sailguard" in c.model_extra]
        assert [block["action"] for block in blocks] == [action]
        assert ends == ["content_filter" if action == "block" else "length"]
        assert text.startswith("I can't continue") == (action == "block")


def test_nothing_of_an_answer_leaves_that_has_not_been_judged(url: str, client: openai.OpenAI) -> None:
    """Steered towards a domain whose rule blocks, the answer itself is stopped: what left before was judged."""
    steer = {"sailguard_tenant": "strict-lab", "sailguard_steer": "politics=3"}
    chunks = list(
        client.chat.completions.create(
            **ask("Write a story.", stream=True, max_tokens=96), extra_body={"vllm_xargs": steer}
        )
    )
    shown = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    (block,) = [c.model_extra["sailguard"] for c in chunks if c.model_extra and "sailguard" in c.model_extra]
    assert block["action"] == "block"
    deciding = min(verdict["token_index"] for verdict in block["verdicts"] if verdict["phase"] == "response")
    text = "".join(shown)
    _, refusal, after = text.partition("I can't continue")
    assert refusal
    assert "\n" not in after
    assert len([piece for piece in shown[:-1] if piece]) <= deciding, "no token from the deciding one on is shown"


def test_other_endpoints_and_choices_are_judged_too(client: openai.OpenAI) -> None:
    body = client.completions.with_raw_response.create(
        model="sailguard", prompt=[POLITICS, HARMLESS[2]], max_tokens=4, n=2, temperature=1.0, seed=3
    )
    block = json.loads(body.text)["sailguard"]
    assert len(json.loads(body.text)["choices"]) == 4
    assert block["action"] == "flag"
    found = client.moderations.create(input=[TERROR, HARMLESS[3]], model="sailguard").results
    assert [result.flagged for result in found] == [True, False]


def test_a_stop_string_ends_an_answer_that_still_carries_its_verdict(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ask(POLITICS, stop=[" the", " a", ","], max_tokens=64))
    answer = json.loads(raw.text)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["sailguard"]["action"] == "flag"


def test_what_a_request_may_not_ask_for_is_a_client_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not in the file"):
        client.chat.completions.create(**ask("Hello"), extra_body={"vllm_xargs": {"sailguard_tenant": "nobody"}})


def test_without_a_key_nothing_is_answered(url: str) -> None:
    for path in ("/v1/chat/completions", "/v1/moderations"):
        assert httpx.post(url + path, json={"input": "x"}).status_code == 401


def test_a_client_that_hangs_up_ends_its_request_and_is_counted(url: str, client: openai.OpenAI) -> None:
    before = counted(url)
    stream = client.chat.completions.create(
        **ask(HARMLESS[4], stream=True, max_tokens=400), extra_body={"ignore_eos": True}
    )
    for _ in range(20):
        next(stream)
    stream.close()
    deadline = time.monotonic() + 60
    name = 'sailguard_requests_total{phase="response",result="allow"}'
    while counted(url)[name] == before[name] and time.monotonic() < deadline:
        client.chat.completions.create(**ask("Hi", max_tokens=1))
    after = counted(url)
    generated = after["sailguard_tokens_generated_total"] - before["sailguard_tokens_generated_total"]
    assert 20 <= generated < 400
    assert generated == after["sailguard_tokens_observed_total"] - before["sailguard_tokens_observed_total"]


def test_our_metrics_stand_on_vllms_page(url: str) -> None:
    page = counted(url)
    assert any(name.startswith("vllm:request_success_total") for name in page)
    assert any(name.startswith("sailguard_bank_info{") for name in page)
    assert page['sailguard_verdicts_total{action="block",domain="terror"}'] > 0
    assert page["sailguard_step_overhead_seconds_count"] > 0
    assert page['sailguard_errors_total{on_error="block"}'] == 0


def test_the_counters_of_two_replicas_add_up(tmp_path: Path) -> None:
    process, url = serve(
        tmp_path / "log",
        {"SAILGUARD_BANK": "shipped", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        "--data-parallel-size",
        "2",
    )
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            body = client.completions.with_raw_response.create(
                model="sailguard", prompt=list(HARMLESS[:6]), max_tokens=5, extra_body={"ignore_eos": True}
            )
        page = counted(url)
    finally:
        stop(process)
    assert len(json.loads(body.text)["choices"]) == 6
    assert page["sailguard_tokens_generated_total"] == page["sailguard_tokens_observed_total"] <= 30
    assert sum(n for name, n in page.items() if name.startswith("sailguard_requests_total{")) == 6
    engines = {
        name.split('engine="')[1].split('"')[0] for name in page if name.startswith("vllm:generation_tokens_total")
    }
    assert engines == {"0", "1"}

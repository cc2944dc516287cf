"""Spans: what they tell, what they never tell, and that no request depends on them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from service.errors import SettingsError
from service.settings import Settings
from service.tracing import TracedRequests, Tracing, start_tracing

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
ENGINE = SimpleNamespace(model_id="tiny", bank_version="bank-1", policy_version="policy-1")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's own variables say nothing here; what a test sets is taken up at once."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(memory: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing.start("sailguard", "1.2.3", exporter=memory)
    yield tracing
    tracing.close(PATIENCE)


def build_app(tracing: Tracing, engine: Any = ENGINE) -> FastAPI:
    app = FastAPI()
    app.state.services = SimpleNamespace(slot=SimpleNamespace(engine=engine))

    @app.post("/v1/things/{name}")
    async def make(name: str, request: Request) -> dict[str, str]:
        request.scope["sailguard.record"] = SimpleNamespace(
            request_id="req_1", action="flag", refused=None, client_gone=False
        )
        with tracing.span("judge", texts=2):
            await request.body()
        return {}

    @app.get("/crash")
    async def crash() -> None:
        with tracing.span("judge"):
            raise ValueError("a small bird")

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {}

    tracing.install(app)
    return app


def spans(tracing: Tracing, memory: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """All spans by name, once everything has been sent."""
    tracing.close(PATIENCE)
    found = memory.get_finished_spans()
    assert len({span.name for span in found}) == len(found)
    return {span.name: span for span in found}


def test_a_request_is_one_span_with_its_parts_below_it(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    with TestClient(build_app(tracing)) as client:
        assert client.post("/v1/things/7").status_code == 200
    found = spans(tracing, memory)
    whole, part = found["POST /v1/things/{name}"], found["judge"]
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is None
    assert dict(whole.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/things/{name}",
        "http.response.status_code": 200,
        "sailguard.request_id": "req_1",
        "sailguard.action": "flag",
        "sailguard.model": "tiny",
        "sailguard.bank": "bank-1",
        "sailguard.policy": "policy-1",
    }
    assert part.parent is not None
    assert part.parent.span_id == whole.get_span_context().span_id
    assert dict(part.attributes or {}) == {"sailguard.texts": 2}
    assert whole.status.status_code is StatusCode.UNSET


def test_a_callers_trace_goes_on(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    with TestClient(build_app(tracing)) as client:
        client.post("/v1/things/7", headers={"traceparent": TRACEPARENT})
    whole = spans(tracing, memory)["POST /v1/things/{name}"]
    assert whole.parent is not None
    assert f"{whole.parent.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == CALLER
    assert f"{whole.get_span_context().trace_id:032x}" == TRACE


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{CALLER}-01", f"{TRACEPARENT}, {TRACEPARENT}"])
def test_a_header_that_names_no_trace_begins_one(tracing: Tracing, memory: InMemorySpanExporter, header: str) -> None:
    with TestClient(build_app(tracing)) as client:
        assert client.post("/v1/things/7", headers={"traceparent": header}).status_code == 200
    assert spans(tracing, memory)["POST /v1/things/{name}"].parent is None


def test_no_text_no_key_and_no_path_is_in_a_span(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    secret = "confidential"
    headers = {
        "Authorization": f"Bearer {secret}",
        "User-Agent": secret,
        "X-Request-Id": secret,
        "traceparent": TRACEPARENT,
        "tracestate": f"vendor={secret}",
        "baggage": f"note={secret}",
    }
    with TestClient(build_app(tracing), raise_server_exceptions=False) as client:
        client.post(f"/v1/things/{secret}?q={secret}", headers=headers, content=secret)
        client.get(f"/{secret}", headers=headers)
        client.get("/crash", headers=headers)
        client.request(secret.upper(), "/v1/things/7", headers=headers)
    tracing.close(PATIENCE)
    told = " ".join(f"{span.to_json()} {span.context.trace_state}" for span in memory.get_finished_spans())
    assert len(memory.get_finished_spans()) == 6
    assert secret not in told.lower()
    assert "bird" not in told


def test_a_failure_is_named_by_its_kind_alone(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    with TestClient(build_app(tracing), raise_server_exceptions=False) as client:
        assert client.get("/crash").status_code == 500
    for span in spans(tracing, memory).values():
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert (span.attributes or {})["error.type"] in {"ValueError", "500"}
        assert not span.events


def test_probes_and_a_server_without_an_engine(tracing: Tracing, memory: InMemorySpanExporter) -> None:
    with TestClient(build_app(tracing, engine=None)) as client:
        client.get("/healthz")
        client.get("/nowhere")
    (found,) = spans(tracing, memory).values()
    assert dict(found.attributes or {}) == {"http.request.method": "GET", "http.response.status_code": 404}


def test_parts_belong_to_their_own_request_when_many_run_at_once(
    tracing: Tracing, memory: InMemorySpanExporter
) -> None:
    many = 20

    async def run() -> None:
        inside = asyncio.Barrier(many)
        traced = TracedRequests(build(inside), tracing=tracing, engine=lambda: None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(traced), base_url="http://test") as client:
            parents = [f"00-{number:032x}-{CALLER}-01" for number in range(1, many + 1)]
            await asyncio.gather(*(client.get("/", headers={"traceparent": parent}) for parent in parents))

    def build(inside: asyncio.Barrier) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            with tracing.span("outer"):
                await inside.wait()
                with tracing.span("inner"):
                    await inside.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        return app

    asyncio.run(run())
    tracing.close(PATIENCE)
    traces: dict[int, list[str]] = {}
    for span in memory.get_finished_spans():
        traces.setdefault(span.get_span_context().trace_id, []).append(span.name)
    assert {trace: sorted(names) for trace, names in traces.items()} == {
        number: ["GET", "inner", "outer"] for number in range(1, many + 1)
    }


def test_switched_off_it_does_nothing_and_imports_nothing() -> None:
    code = """
        import sys
        from fastapi import FastAPI
        from service.settings import Settings
        from service.tracing import start_tracing
        tracing = start_tracing(Settings(), "1")
        app = FastAPI()
        tracing.install(app)
        with tracing.span("judge", texts=1):
            pass
        tracing.close()
        assert not app.user_middleware
        assert not any(name.startswith("opentelemetry.sdk") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True, timeout=60)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"'tracing'.*sailguard\[otel\]"):
        start_tracing(Settings(tracing=True), "1")


def test_a_variable_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with pytest.raises(SettingsError, match="'tracing'"):
        start_tracing(Settings(tracing=True), "1")


class Collector:
    """A collector on loopback; while `held`, it takes requests and answers none."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        self.taken: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.release()
                assert collector.go.wait(PATIENCE)
                if self.path == "/v1/traces":
                    collector.taken.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)

    def names(self) -> list[str]:
        return [
            span.name
            for request in self.taken
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def resources(self) -> list[dict[str, str]]:
        return [
            {entry.key: entry.value.string_value for entry in resource.resource.attributes}
            for request in self.taken
            for resource in request.resource_spans
        ]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
        yield collector


def test_a_collector_is_sent_everything_by_the_end(collector: Collector) -> None:
    tracing = start_tracing(Settings(tracing=True), "1.2.3")
    with TestClient(build_app(tracing)) as client:
        for _ in range(3):
            client.post("/v1/things/7")
    tracing.close(PATIENCE)
    assert sorted(collector.names()) == sorted(["POST /v1/things/{name}", "judge"] * 3)
    for resource in collector.resources():
        assert (resource["service.name"], resource["service.version"]) == ("sailguard", "1.2.3")


def test_an_operators_own_names_win(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "judge-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    tracing = start_tracing(Settings(tracing=True), "1.2.3")
    with TestClient(build_app(tracing)) as client:
        client.post("/v1/things/7")
    tracing.close(PATIENCE)
    for resource in collector.resources():
        assert resource["service.name"] == "judge-7"
        assert resource["deployment.environment.name"] == "lab"


def test_requests_do_not_wait_for_a_collector_that_answers_nothing(collector: Collector) -> None:
    collector.go.clear()
    tracing = start_tracing(Settings(tracing=True), "1")
    with TestClient(build_app(tracing)) as client:
        client.post("/v1/things/7")
        assert collector.asked.acquire(timeout=PATIENCE), "no spans were sent"
        assert all(client.post("/v1/things/7").status_code == 200 for _ in range(20))
    assert collector.taken == []
    tracing.close(0.05)  # it gives up; the rest of the test would not be reached otherwise
    collector.go.set()


def test_a_collector_that_is_gone_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as gone:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", gone.address)
    tracing = start_tracing(Settings(tracing=True), "1")
    with TestClient(build_app(tracing)) as client:
        assert all(client.post("/v1/things/7").status_code == 200 for _ in range(5))
    tracing.close(0.05)


def test_the_service_sends_spans_of_its_own_requests(collector: Collector, make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(tracing=True)) as client:
        client.post("/v1/moderations", json={"input": "a small bird"}, headers={"traceparent": TRACEPARENT})
    names = collector.names()
    assert "POST /v1/moderations" in names
    assert "judge" in names

"""The service's edge around routes that only say what reached them, called without a client in between."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from guard.metrics import Metrics
from service.auth import KeyRing
from service.edge import install_middleware
from service.errors import install_error_handlers
from service.limits import Limiter
from service.middleware import JsonRoute
from service.settings import Settings

LOCAL = (b"host", b"127.0.0.1:8801")
PATIENCE = 10.0


@dataclass(slots=True)
class Edge:
    """An application behind the edge, with its log and metrics."""

    app: FastAPI
    keys: KeyRing
    limiter: Limiter
    metrics: Metrics
    settings: Settings
    text: io.StringIO
    reached: list[str] = field(default_factory=list)

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.getvalue().splitlines()]

    def refusals(self, reason: str) -> float:
        value = self.metrics.registry.get_sample_value("sailguard_refused_total", {"reason": reason})
        assert value is not None
        return value

    def get(self, path: str = "/v1/models", *headers: tuple[bytes, bytes], **options: Any) -> Answer:
        return asyncio.run(call(self.app, "GET", path, headers, **options))

    def post(self, path: str, *headers: tuple[bytes, bytes], **options: Any) -> Answer:
        return asyncio.run(call(self.app, "POST", path, headers, **options))


def make_edge(**settings: Any) -> Edge:
    """Every path answers with 200 and reads its body; a few do more."""
    text = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(text),
        processors=[structlog.processors.add_log_level, structlog.processors.JSONRenderer()],
    )
    app = FastAPI(openapi_url=None)
    app.router.route_class = JsonRoute
    install_error_handlers(app)
    made = Settings(**settings)
    metrics = Metrics()
    keys = made.key_ring()
    limiter = install_middleware(app, made, metrics, logger, keys)
    edge = Edge(app, keys, limiter, metrics, made, text)

    @app.get("/page")
    async def page() -> Response:
        return PlainTextResponse("page", headers={"Content-Security-Policy": "default-src 'self'"})

    @app.get("/fails")
    async def fails() -> Response:
        raise RuntimeError("confidential")

    @app.get("/endless")
    async def endless() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"a bird\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(chunks())

    @app.post("/json")
    async def take(request: Request) -> Response:
        await request.json()
        return PlainTextResponse("ok")

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def anything(path: str, request: Request) -> Response:
        body = await request.body()
        edge.reached.append(f"{request.method} /{path}")
        return PlainTextResponse(str(len(body)))

    return edge


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; `reads` is how often the body was asked for."""

    status: int
    headers: dict[str, str]
    body: bytes
    reads: int

    @property
    def error(self) -> dict[str, Any]:
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


async def call(
    app: Any,
    method: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    chunks: Iterable[bytes] = (b"",),
    complete: bool = True,
    client: tuple[str, int] | None = ("127.0.0.1", 1),
    host: tuple[bytes, bytes] | None = LOCAL,
    while_open: Callable[[], None] | None = None,
    drip: bytes = b"",
) -> Answer:
    """Send one request. A body that is not `complete` never ends: it stops, or goes on with `drip` again and again."""
    parts = list(chunks)
    messages = [
        {"type": "http.request", "body": part, "more_body": not complete or number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    sent: list[dict[str, Any]] = []
    reads = 0
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [*([host] if host else []), *headers],
        "client": client,
        "server": ("127.0.0.1", 8801),
    }

    async def receive() -> Any:
        nonlocal reads
        reads += 1
        if messages:
            return messages.pop(0)
        if drip:
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": drip, "more_body": True}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if while_open is not None:
            while_open()
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    return Answer(
        status=start["status"],
        headers={name.decode().lower(): value.decode() for name, value in start["headers"]},
        body=b"".join(message.get("body", b"") for message in sent[1:]),
        reads=reads,
    )


def bearer(key: str) -> tuple[bytes, bytes]:
    return b"authorization", f"Bearer {key}".encode()


def write_keys(path: Path, *lines: str) -> Path:
    """Write a keys file that is its owner's alone."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    path.chmod(0o600)
    return path


@contextlib.asynccontextmanager
async def serving(edge: Edge) -> AsyncIterator[tuple[str, int]]:
    """A real server on a free loopback port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(edge.app, lifespan="off", access_log=False, server_header=False, log_level="critical")
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until(lambda: server.started)
        yield listener.getsockname()
    finally:
        server.should_exit = True
        await asyncio.wait_for(running, PATIENCE)


async def until(true: Callable[[], bool]) -> None:
    """Wait until `true` says so."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)

"""An OpenAI-like server on loopback that says what a test's script tells it to, byte by byte if need be."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Speaker:
    """What a script answers with. The connection is closed at its end, which ends the body, too."""

    def __init__(self, server: UpstreamServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer

    async def head(self, status: int = 200, content_type: str = "text/event-stream", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Scripted", f"Content-Type: {content_type}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def json(self, body: Any, status: int = 200, **headers: str) -> None:
        await self.head(status, "application/json", **headers)
        await self.raw(json.dumps(body).encode())

    async def event(self, event: Any) -> None:
        await self.raw(encoded(event))

    async def chat(self, *deltas: Any, index: int = 0, finish: str | None = "stop", done: bool = True) -> None:
        """The events of one choice: a string is content."""
        for delta in deltas:
            await self.event(chunk({"content": delta} if isinstance(delta, str) else delta, index=index))
        if finish is not None:
            await self.event(chunk({}, index=index, finish=finish))
        if done:
            await self.event("[DONE]")

    async def until(self, gate: str) -> None:
        """Wait until the test opens the gate."""
        await asyncio.wait_for(self._server.gate(gate).wait(), PATIENCE)

    async def until_hung_up(self) -> None:
        """Wait until the other side closes the connection."""
        await asyncio.wait_for(self._reader.read(), PATIENCE)
        self._server.hung_up.set()

    def reset(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()


Script = Callable[[Received, Speaker], Awaitable[None]]


def chunk(delta: Any, *, index: int = 0, finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {**HEAD, "object": "chat.completion.chunk", "choices": [choice], **more}


def message(*texts: str, **more: Any) -> dict[str, Any]:
    choices = [
        {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for number, text in enumerate(texts)
    ]
    return {**HEAD, "object": "chat.completion", "choices": choices, **more}


HEAD = {"id": "chatcmpl-upstream", "created": 1700000000, "model": "upstream-model"}


def encoded(event: Any, newline: str = "\n") -> bytes:
    data = event if isinstance(event, str) else json.dumps(event)
    return f"data: {data}{newline}{newline}".encode()


class UpstreamServer:
    """Serves `script` from a thread of its own, one request a connection."""

    def __init__(self) -> None:
        self.script: Script = lambda request, say: say.json(message("hello"))
        self.requests: list[Received] = []
        self.hung_up = threading.Event()
        self.port = 0
        self._gates: dict[str, asyncio.Event] = {}
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstream")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(PATIENCE), "the upstream did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the upstream did not stop"

    def gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    def open(self, gate: str) -> None:
        self._loop.call_soon_threadsafe(lambda: self.gate(gate).set())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._loop.shutdown_asyncgens()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Received(method, path, headers, body)
            self.requests.append(request)
            await self.script(request, Speaker(self, reader, writer))
        except ConnectionError:  # hung up with bytes unread
            self.hung_up.set()
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


def pieces(data: bytes, size: int) -> Iterable[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))

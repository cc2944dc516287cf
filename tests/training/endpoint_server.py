"""A real HTTP server on the loopback interface that behaves, request by request, as a script says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PATIENCE = 10.0
Behaviour = Callable[[BaseHTTPRequestHandler, Mapping[str, Any]], None]


def say(
    text: str | Callable[[Mapping[str, Any]], str] | None,
    *,
    usage: Mapping[str, Any] | None = None,
    report_usage: bool = True,
) -> Behaviour:
    """A proper chat completion. text: the answer, or what makes it from the request's body."""

    def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        content = text(body) if callable(text) else text
        answer: dict[str, Any] = {
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        }
        if report_usage:
            answer["usage"] = usage or {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        _send(handler, 200, json.dumps(answer).encode())

    return behave


def fail(status: int, message: str = "no", **headers: str) -> Behaviour:
    """An error in OpenAI's shape. Underscores in the headers' names stand for hyphens."""

    def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        _send(handler, status, json.dumps({"error": {"message": message}}).encode(), headers)

    return behave


def raw(content: bytes, status: int = 200) -> Behaviour:
    """These bytes as the body, whatever they are."""
    return lambda handler, body: _send(handler, status, content)


def drop(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
    """Announce an answer and close the connection in the midst of it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def without(parameter: str, then: Behaviour, message: str | None = None) -> Behaviour:
    """Refuse a request that has the parameter."""

    def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        refusal = fail(400, message or f"Unsupported parameter: '{parameter}'")
        (refusal if parameter in body else then)(handler, body)

    return behave


class ScriptedServer:
    """Follows `script`, one behaviour a request, and then `usual` for ever. Every body and header is kept."""

    def __init__(self, *script: Behaviour, usual: Behaviour | None = None) -> None:
        self.script = list(script)
        self.usual = usual or say("{}")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        """The last message of every request, in the order of arrival."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def slow(self, seconds: float, then: Behaviour | None = None) -> Behaviour:
        """Answer late, or never if the server is stopped before."""

        def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
            if not self.ended.wait(seconds):
                (then or self.usual)(handler, body)

        return behave

    def trickle(self, seconds: float) -> Behaviour:
        """Send a blank every so often, and never anything else."""

        def behave(handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
            while not self.ended.wait(seconds):
                handler.wfile.write(b" ")

        return behave

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    behave = server.script.pop(0) if server.script else server.usual
                self.close_connection = True  # the client may be gone before the answer
                with contextlib.suppress(OSError):
                    behave(self, body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        return Handler


def _send(
    handler: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str] | None = None
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.send_header("Connection", "close")
    for name, value in (headers or {}).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)

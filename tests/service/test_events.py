"""The stream of verdicts: nobody waits for a listener, and a listener learns what it missed."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Receive, Scope, Send

from service.auth import Principal, Role
from service.errors import ApiError, install_error_handlers
from service.events import Event, EventBus
from service.routes import events as route
from service.services import Services
from tests.service.audits import entry

PATIENCE = 20.0


def numbered(*numbers: int) -> list[dict[str, int]]:
    return [{"n": number} for number in numbers]


async def take(events: Any, count: int) -> list[Event]:
    return [await asyncio.wait_for(anext(events), PATIENCE) for _ in range(count)]


# The bus


def test_each_subscriber_gets_every_event_once_and_in_order() -> None:
    async def run() -> None:
        bus = EventBus()
        async with bus.subscribe() as first, bus.subscribe() as second:
            for event in numbered(1, 2, 3):
                bus.publish(event)
            assert await take(first, 3) == await take(second, 3) == numbered(1, 2, 3)

    asyncio.run(run())


def test_a_waiting_subscriber_is_woken() -> None:
    async def run() -> None:
        bus = EventBus()
        async with bus.subscribe() as events:
            waiting = asyncio.ensure_future(take(events, 2))
            for event in numbered(1, 2):
                await asyncio.sleep(0)
                bus.publish(event)
            assert await waiting == numbered(1, 2)

    asyncio.run(run())


def test_a_slow_subscriber_loses_its_oldest_events_is_told_and_slows_nobody() -> None:
    async def run() -> None:
        bus = EventBus(queue=3)
        async with bus.subscribe() as slow, bus.subscribe() as quick:
            for event in numbered(*range(8)):
                bus.publish(event)
                assert await take(quick, 1) == [event]
            assert await take(slow, 4) == [{"type": "dropped", "count": 5}, *numbered(5, 6, 7)]
            bus.publish({"n": 9})
            assert await take(slow, 1) == numbered(9)

    asyncio.run(run())


def test_events_that_are_not_wanted_push_nothing_out() -> None:
    async def run() -> None:
        bus = EventBus(queue=2)
        async with bus.subscribe(lambda event: event["n"] % 10 == 0) as tens:
            for event in numbered(*range(21)):
                bus.publish(event)
            assert await take(tens, 3) == [{"type": "dropped", "count": 1}, *numbered(10, 20)]

    asyncio.run(run())


def test_places_are_bounded_and_come_free() -> None:
    async def run() -> None:
        bus = EventBus(max_subscribers=2)
        async with bus.subscribe():
            with contextlib.suppress(ZeroDivisionError):
                async with bus.subscribe():
                    with pytest.raises(ApiError) as caught:
                        bus.subscribe()
                    assert caught.value.status_code == 429
                    raise ZeroDivisionError
            assert bus.subscribers == 1
            bus.subscribe().close()
            assert bus.subscribers == 1
        assert bus.subscribers == 0
        bus.publish({"n": 1})

    asyncio.run(run())


def test_closing_the_bus_ends_every_subscription_after_what_waits() -> None:
    async def run() -> None:
        bus = EventBus()
        idle, behind = bus.subscribe(), bus.subscribe(lambda event: True)
        waiting = asyncio.ensure_future(anext(idle, None))
        await asyncio.sleep(0)
        behind.put({"n": 1})
        bus.close()
        assert await asyncio.wait_for(waiting, PATIENCE) is None
        assert [event async for event in behind] == numbered(1)
        assert bus.subscribers == 0
        with pytest.raises(ApiError) as caught:
            bus.subscribe()
        assert caught.value.status_code == 503

    asyncio.run(run())


# The route


class Server(uvicorn.Server):
    """Closes the bus when it is told to end, as the application's server does."""

    bus: EventBus

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.bus.close()
        await super().shutdown(sockets)


class Streaming:
    """A server of the route alone, and what tests need of it."""

    def __init__(self, bus: EventBus, *, role: Role | None = None) -> None:
        self.bus = bus
        app = FastAPI()
        install_error_handlers(app)
        app.include_router(route.router)
        self.app = self._as(app, role)
        self.server = Server(uvicorn.Config(self.app, log_level="warning", lifespan="off", port=0))
        self.server.bus = bus
        self._thread = threading.Thread(target=self.server.run)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[http.client.HTTPResponse, http.client.HTTPConnection] = {}

    def _as(self, app: FastAPI, role: Role | None) -> Any:
        async def with_key(scope: Scope, receive: Receive, send: Send) -> None:
            self.loop = asyncio.get_running_loop()
            if role is not None:
                scope["sailguard.principal"] = Principal(key_id="key_1", role=role)
            await app(scope, receive, send)

        return with_key

    def __enter__(self) -> Streaming:
        self._thread.start()
        self.until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        for response in tuple(self._open):
            self.hang_up(response)
        assert not self._thread.is_alive(), "the server did not stop"

    def listen(self, query: str = "") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", f"/v1/events{query}")
        response = connection.getresponse()
        self._open[response] = connection
        return response

    def hang_up(self, response: http.client.HTTPResponse) -> None:
        self._open.pop(response).close()
        response.close()

    def publish(self, *events: Event) -> None:
        assert self.loop is not None
        for event in events:
            self.loop.call_soon_threadsafe(self.bus.publish, event)

    @staticmethod
    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it never came to be"
            time.sleep(0.01)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Streaming]]:
    """Starts servers; they are stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(bus: EventBus | None = None, **options: Any) -> Streaming:
            bus = EventBus() if bus is None else bus
            monkeypatch.setattr(Services, "of", lambda _: SimpleNamespace(events=bus))
            return stack.enter_context(Streaming(bus, **options))

        yield start


def read(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The next event."""
    while line := response.readline():
        if line.startswith(b"data: "):
            data: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            return data
    raise AssertionError("the stream ended")


@pytest.mark.parametrize(("role", "names_keys"), [(None, False), (Role.READER, False), (Role.ADMIN, True)])
def test_verdicts_are_streamed_without_texts_and_keys_are_named_to_admins_alone(
    stream: Callable[..., Streaming], role: Role | None, names_keys: bool
) -> None:
    served = stream(role=role)
    response = served.listen()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    given = entry(text="a heron\r\ndata: {}\r\n\r\n", rule="a\nb\r\u2028\ud800", score=float("inf"))
    event = given.event()
    served.publish({**event, "text": "never"}, {"type": "dropped", "count": 2})
    found = read(response)
    assert found == {name: value for name, value in event.items() if names_keys or name != "key_id"}
    assert ("key_id" in found) is names_keys
    assert found["score"] is None
    assert read(response) == {"type": "dropped", "count": 2}


def test_a_listener_gets_what_it_asked_for_alone(stream: Callable[..., Streaming]) -> None:
    served = stream()
    blocks = served.listen("?action=block")
    terror = served.listen("?domain=terror&domain=politics&action=flag&action=block")
    events = [
        entry("a", action="flag", domain="terror").event(),
        entry("b", action="block", domain="violence").event(),
        entry("c", action="block", domain="politics").event(),
        entry("d", action="steer", domain="terror").event(),
        entry("e", action="block", domain="terror").event(),
    ]
    served.publish(*events)
    assert [read(blocks)["request_id"] for _ in range(3)] == ["b", "c", "e"]
    assert [read(terror)["request_id"] for _ in range(3)] == ["a", "c", "e"]


def test_an_idle_stream_beats(stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "_PING_SECONDS", 0.05)
    response = stream().listen()
    assert [response.readline()[:6] for _ in range(3)] == [b": ping", b"\n", b": ping"]


def test_a_client_that_goes_frees_its_place_and_one_too_many_is_refused(stream: Callable[..., Streaming]) -> None:
    served = stream(EventBus(max_subscribers=1))
    first = served.listen()
    refused = served.listen()
    assert refused.status == 429
    assert refused.headers["retry-after"]
    assert json.loads(refused.read())["error"]["code"] == "too_many_subscribers"
    served.hang_up(first)
    served.until(lambda: served.bus.subscribers == 0)
    again = served.listen()
    served.publish({"type": "x"})
    assert read(again) == {"type": "x"}


def test_a_client_that_stops_reading_is_cut_off_and_holds_up_nobody(
    stream: Callable[..., Streaming], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "_SEND_SECONDS", 0.2)
    served = stream(EventBus(queue=100))
    with socket.create_connection(("127.0.0.1", served.port)) as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(b"GET /v1/events?action=block HTTP/1.1\r\nHost: localhost\r\n\r\n")
        served.until(lambda: served.bus.subscribers == 1)
        other = served.listen("?action=flag")
        served.publish(*[{"action": "block", "padding": "x" * 100_000}] * 200)
        served.publish({"action": "flag"})
        assert read(other) == {"action": "flag"}
        served.until(lambda: served.bus.subscribers == 1)


def test_streams_end_when_the_server_does(stream: Callable[..., Streaming]) -> None:
    served = stream()
    responses = [served.listen(), served.listen()]
    served.server.should_exit = True
    for response in responses:
        assert response.read() == b""
    assert served.bus.subscribers == 0


@pytest.mark.parametrize("query", ["?action=allow", "?action=", "?action=block&action=x"])
def test_an_action_that_there_is_not_is_refused(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = EventBus()
    monkeypatch.setattr(Services, "of", lambda _: SimpleNamespace(events=bus))
    with TestClient(Streaming(bus).app) as client:
        response = client.get(f"/v1/events{query}")
    assert response.status_code == 400
    assert "action" in response.json()["error"]["param"]
    assert bus.subscribers == 0

"""Rates hold over any window, senders do not touch each other's, and a slot is given back however a request ends."""

from __future__ import annotations

import asyncio
import io
from collections import defaultdict
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage

from service import limits as module
from service.errors import SettingsError
from service.limits import Limiter, Limits, Window, duration, parse_rate
from service.middleware import Record
from service.settings import Settings
from tests.service.edges import Edge, bearer, call, make_edge, serving, until, write_keys

DIGESTS = {"a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(**options: Any) -> tuple[Limiter, io.StringIO]:
    text = io.StringIO()
    return Limiter(logger=structlog.wrap_logger(structlog.PrintLogger(text)), **options), text


# ---- rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "seconds"),
    [
        ("600/minute", 600, 60),
        ("1/second", 1, 1),
        ("10/5 seconds", 10, 5),
        ("10 per hour", 10, 3600),
        ("9/2days", 9, 172800),
    ],
)
def test_rates_are_read(text: str, amount: int, seconds: int) -> None:
    rate = parse_rate(text)
    assert (rate.amount, rate.get_expiry()) == (amount, seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "0/minute",
        "-1/minute",
        "1/fortnight",
        "1/minute;2/hour",
        "100001/day",
        "1/2year",
        "9" * 5000 + "/day",
    ],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a rate is"):
        parse_rate(text)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 4, allow_nan=False)), max_size=40),
    amount=st.integers(1, 4),
)
def test_no_window_holds_more_than_the_rate_and_nothing_that_fits_is_refused(
    steps: list[tuple[str, float]], amount: int
) -> None:
    clock = Clock()
    window = Window(clock=clock)
    rate = parse_rate(f"{amount}/5seconds")
    taken: dict[str, list[float]] = defaultdict(list)
    for sender, wait in steps:
        clock.now += wait
        recent = [time for time in taken[sender] if time > clock.now - 5]
        standing = window.hit(sender, rate)
        assert standing.allowed == (len(recent) < amount)
        if standing.allowed:
            taken[sender].append(clock.now)
            recent.append(clock.now)
        assert standing.remaining == amount - len(recent)
        assert standing.reset == pytest.approx(recent[0] + 5 - clock.now)


def test_memory_is_bounded_and_shrinks_with_time() -> None:
    clock = Clock()
    window = Window(most=100, clock=clock)
    rate = parse_rate("2/minute")
    for number in range(1000):
        window.hit(f"address:{number}", rate)
        assert len(window) <= 100
    assert window.hit("address:999", rate).remaining == 0  # who was seen last is not forgotten
    clock.now += 60
    window.hit("address:0", rate)
    assert len(window) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.1201, "121ms"),
        (1.0, "1s"),
        (59.2, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (86399, "23h59m59s"),
    ],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- over HTTP -------------------------------------------------------------------------------------------------


def test_over_the_rate_is_429_with_the_time_to_wait_and_before_the_body_is_read() -> None:
    edge = make_edge(api_keys="a", rate_limit="2/minute")
    answers = [edge.post("/v1/moderations", bearer("a")) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    refused = answers[-1]
    assert (refused.error["code"], refused.error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "2 per 1 minute" in refused.error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-reset-requests"] in ("1m0s", *(f"{second}s" for second in range(1, 60)))
    assert refused.reads == 0
    assert edge.refusals("rate") == 1
    assert len(edge.reached) == 2


def test_senders_do_not_touch_each_others_limits(tmp_path: Any) -> None:
    path = write_keys(
        tmp_path / "keys",
        f"sha256:{DIGESTS['a']} team-a client rate=3/minute",
        "b",
        "c",
    )
    edge = make_edge(api_keys_file=path, rate_limit="1/minute")
    assert [edge.get("/v1/models", bearer("a")).status for _ in range(4)] == [200, 200, 200, 429]
    for key in "bc":
        assert [edge.get("/v1/models", bearer(key)).status for _ in range(2)] == [200, 429]
    assert edge.get("/v1/models", bearer("wrong")).status == 401  # who has no key cannot use up anybody's


def test_a_key_may_have_a_limit_where_the_server_has_none(tmp_path: Any) -> None:
    path = write_keys(tmp_path / "keys", f"sha256:{DIGESTS['a']} team-a client rate=1/minute concurrent=1", "b")
    edge = make_edge(api_keys_file=path)
    assert [edge.get("/v1/models", bearer("a")).status for _ in range(2)] == [200, 429]
    answer = edge.get("/v1/models", bearer("b"))
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_without_keys_addresses_are_counted() -> None:
    edge = make_edge(rate_limit="1/minute")

    def status(client: tuple[str, int] | None) -> int:
        return edge.get("/v1/models", client=client).status

    assert [status(("127.0.0.1", 1)), status(("127.0.0.1", 2)), status(("127.0.0.2", 1))] == [200, 429, 200]
    # One machine may take any address of its IPv6 network.
    assert [status(("2001:db8::1", 1)), status(("2001:db8::2%eth0", 1)), status(("2001:db8:0:1::1", 1))] == [
        200,
        429,
        200,
    ]
    assert [status(None), status(None), status(("socket", 0)), status(("socket", 0))] == [200, 429, 200, 429]


def test_probes_and_open_metrics_have_no_limit() -> None:
    edge = make_edge(rate_limit="1/minute", key_concurrent=1)
    for path in ("/healthz", "/readyz", "/metrics") * 3:
        assert edge.get(path).status == 200
    edge = make_edge(rate_limit="1/minute", api_keys="a", host="0.0.0.0")
    assert [edge.get("/metrics", bearer("a")).status for _ in range(2)] == [200, 429]


# ---- concurrency -----------------------------------------------------------------------------------------------


def test_one_more_open_request_than_allowed_is_429() -> None:
    edge = make_edge(api_keys="a,b", key_concurrent=2, rate_limit="100/minute")
    inner: list[Any] = []

    async def run() -> None:
        async def third() -> None:
            inner.append(await call(edge.app, "POST", "/v1/moderations", [bearer("a")]))
            inner.append(await call(edge.app, "POST", "/v1/moderations", [bearer("b")]))

        pending = [
            asyncio.create_task(call(edge.app, "POST", "/v1/moderations", [bearer("a")], complete=False))
            for _ in range(2)
        ]
        await until(lambda: edge.limiter.open == 2)
        await third()
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        inner.append(await call(edge.app, "POST", "/v1/moderations", [bearer("a")]))

    asyncio.run(run())
    assert [answer.status for answer in inner] == [429, 200, 200]
    assert inner[0].headers["retry-after"] == "1"
    assert inner[0].error["code"] == "rate_limit_exceeded"
    assert inner[0].reads == 0
    assert inner[2].headers["x-ratelimit-remaining-requests"] == "97"  # what was refused has used nothing up
    assert edge.refusals("concurrency") == 1
    assert edge.limiter.open == 0


def one_at_a_time(**more: Any) -> Edge:
    return make_edge(api_keys="a", key_concurrent=1, **more)


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 200), ("/fails", 500), ("/json/", 200), ("/page", 200)])
def test_a_slot_is_given_back_when_a_request_ends(path: str, status: int) -> None:
    edge = one_at_a_time()
    held: list[int] = []
    for _ in range(3):
        answer = edge.get(path, bearer("a"), while_open=lambda: held.append(edge.limiter.open))
        assert answer.status == status
        assert edge.limiter.open == 0
    assert (1 in held) == (status == 200)  # an exception has left the layer when it is answered


def test_a_slot_is_given_back_when_the_rate_refuses() -> None:
    edge = one_at_a_time(rate_limit="1/minute")
    assert [edge.get("/v1/models", bearer("a")).status for _ in range(3)] == [200, 429, 429]
    assert edge.limiter.open == 0
    assert edge.refusals("concurrency") == 0


def test_a_slot_is_given_back_when_the_client_of_a_stream_hangs_up() -> None:
    edge = one_at_a_time()

    async def run() -> None:
        async with serving(edge) as (host, port):
            for _ in range(3):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\n\r\n")
                await reader.readuntil(b"a bird")
                assert edge.limiter.open == 1
                writer.close()
                await writer.wait_closed()
                await until(lambda: edge.limiter.open == 0)

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
def test_a_slot_is_given_back_after_any_exception(error: type[BaseException]) -> None:
    held, _ = limiter(concurrent=1)

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        assert held.open == 1
        raise error

    async def run() -> None:
        scope = {"type": "http", "path": "/x", "client": None, "sailguard.record": Record("r")}
        with pytest.raises(error):
            await Limits(fails, limiter=held, open_paths=())(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert held.open == 0


@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), cap=st.integers(0, 3))
def test_slots_are_counted_by_sender_and_nothing_is_left_over(steps: list[tuple[str, bool]], cap: int) -> None:
    held, _ = limiter(concurrent=cap)
    open_ones: dict[str, int] = defaultdict(int)
    for sender, enters in steps:
        if enters:
            reached = held.enter(sender)
            assert (reached is not None) == (cap > 0 and open_ones[sender] >= cap)
            open_ones[sender] += reached is None
        elif open_ones[sender]:
            held.leave(sender)
            open_ones[sender] -= 1
        assert held.open == sum(open_ones.values())
    for sender, count in open_ones.items():
        for _ in range(count):
            held.leave(sender)
    assert held._open == {}


# ---- a store that several processes share ----------------------------------------------------------------------


class Broken(MemoryStorage):
    """A store that fails, or hangs, until it is mended."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = True
        self.hangs = False
        self.asked = 0

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.broken:
            raise ConnectionError("redis://:password@store")
        return await super().acquire_entry(key, limit, expiry, amount)


def test_limiters_with_one_store_count_together() -> None:
    async def run() -> list[bool]:
        store = MemoryStorage()
        pair = [limiter(rate="3/minute", store=store)[0] for _ in range(2)]
        standings = [await pair[number % 2].hit("a") for number in range(5)]
        assert [standing.remaining for standing in standings if standing] == [2, 1, 0, 0, 0]
        return [standing.allowed for standing in standings if standing]

    assert asyncio.run(run()) == [True, True, True, False, False]


@pytest.mark.parametrize("hangs", [False, True])
def test_while_the_store_is_broken_the_process_counts_alone(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    monkeypatch.setattr(module, "_STORE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_STORE_PAUSE", 0.0)

    async def run() -> tuple[list[bool], str]:
        store = Broken()
        store.hangs = hangs
        counting, text = limiter(rate="2/minute", store=store)
        found = [await counting.hit("a") for _ in range(4)]
        store.broken = store.hangs = False
        found.append(await counting.hit("a"))
        return [standing.allowed for standing in found if standing], text.getvalue()

    allowed, said = asyncio.run(run())
    assert allowed == [True, True, False, False, True]
    assert said.count("counts alone") == 1
    assert said.count("works again") == 1
    assert "password" not in said


def test_a_broken_store_is_left_alone_for_a_while() -> None:
    async def run() -> int:
        store = Broken()
        counting, _ = limiter(rate="5/minute", store=store)
        for _ in range(5):
            await counting.hit("a")
        return store.asked

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize("uri", ["redis://:password@127.0.0.1:1/0", "nothing://password@host", "password"])
def test_a_store_that_cannot_be_used_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(SettingsError, match="rate_storage") as caught:
        Limiter.of(Settings(rate_storage=uri, rate_limit="1/minute"), None)
    assert "password" not in str(caught.value)
    assert caught.value.__cause__ is None

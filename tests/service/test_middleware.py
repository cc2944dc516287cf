"""The layers around the routes: hosts and origins, bodies, headers, the log, and their order."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.middleware import BodyLimit, Record
from tests.service.edges import PATIENCE, bearer, call, make_edge, serving

JSON = (b"content-type", b"application/json")


def with_host(value: bytes) -> tuple[bytes, bytes]:
    return b"host", value


# ---- hosts and origins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost:8801", "127.0.0.1", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:8801", "guard.local:80"],
)
def test_without_keys_this_machines_names_are_answered(host: str) -> None:
    edge = make_edge(allowed_hosts="Guard.local, other")
    assert edge.get(host=with_host(host.encode())).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "example.org",
        "localhost.example.org",
        "example.org:8801",
        "127.0.0.1.example.org",
        "127.0.0.1:8801:1",
        "127.0.0.1:",
        "127.0.0.1@example.org",
        "localhost, example.org",
        "localhost/",
        "::1",
        "[::1",
        "[::2]",
        "0.0.0.0",
        "10.0.0.1",
        "2130706433",
        "0x7f.1",
        "localhost ",
        "local host",
        "b\xfccher.local",
        "guard.local",
    ],
)
def test_without_keys_other_hosts_are_refused(host: str) -> None:
    edge = make_edge()
    for path in ("/v1/models", "/healthz", "/metrics", "/admin"):
        answer = edge.get(path, host=with_host(host.encode("latin-1")))
        assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
        assert answer.reads == 0
    assert edge.refusals("host") == 4
    assert edge.reached == []
    if "example" in host:
        assert host not in answer.body.decode() + edge.text.getvalue()


def test_a_request_without_or_with_two_hosts_is_refused() -> None:
    edge = make_edge()
    assert edge.get(host=None).status == 403
    assert edge.get("/v1/models", with_host(b"example.org")).status == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8801", 200),
        ("HTTP://127.0.0.1:8801", 200),
        ("https://chat.example.org", 200),
        ("https://127.0.0.1:8801", 403),
        ("http://127.0.0.1:8802", 403),
        ("http://localhost:8801", 403),
        ("http://chat.example.org", 403),
        ("https://chat.example.org.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_without_keys_pages_of_other_sites_are_refused(origin: str, status: int) -> None:
    edge = make_edge(cors_origins="https://chat.example.org")
    answer = edge.post("/v1/moderations", (b"origin", origin.encode()), JSON)
    assert answer.status == status
    if status == 403:
        assert answer.error["code"] == "origin_not_allowed"
        assert answer.reads == 0


def test_with_keys_hosts_and_origins_are_free() -> None:
    edge = make_edge(api_keys="key-one")
    answer = edge.get("/v1/models", bearer("key-one"), (b"origin", b"https://a.example"), host=with_host(b"a.example"))
    assert answer.status == 200


@settings(max_examples=300, deadline=None)
@given(host=st.binary(max_size=40), origin=st.binary(max_size=40))
@example(b"[::1%25lo]", b"")
@example(b"[::ffff:127.0.0.1]", b"http://[")
@example(b"\xb2.0.0.1", b"\xff")
def test_no_host_or_origin_is_a_server_error(host: bytes, origin: bytes) -> None:
    edge = make_edge(allowed_hosts="guard.local")
    assert edge.get(host=with_host(host)).status in (200, 403)
    assert edge.get("/v1/models", (b"origin", origin)).status == 403


PREFLIGHT = ((b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization"))


@pytest.mark.parametrize("keys", ["", "key-one"])
def test_named_origins_get_cors_and_no_others(keys: str) -> None:
    edge = make_edge(api_keys=keys, cors_origins="https://chat.example.org")
    good, bad = (b"origin", b"https://chat.example.org"), (b"origin", b"https://other.example")
    preflight = asyncio.run(call(edge.app, "OPTIONS", "/v1/chat/completions", [good, *PREFLIGHT]))
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-credentials" not in preflight.headers
    answer = edge.get("/v1/models", good, bearer("key-one"))
    assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "X-Sailguard-Action" in answer.headers["access-control-expose-headers"]
    refused = edge.get("/v1/models", good, bearer("wrong"))
    assert refused.status == (401 if keys else 200)
    assert refused.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in edge.get("/v1/models", bad, bearer("key-one")).headers
    other = asyncio.run(call(edge.app, "OPTIONS", "/v1/chat/completions", [bad, *PREFLIGHT]))
    assert 400 <= other.status < 500
    assert "access-control-allow-origin" not in other.headers


def test_without_named_origins_there_is_no_cors() -> None:
    edge = make_edge(api_keys="key-one")
    origin = (b"origin", b"https://chat.example.org")
    for answer in (
        edge.get("/v1/models", origin, bearer("key-one")),
        asyncio.run(call(edge.app, "OPTIONS", "/v1/chat/completions", [origin, *PREFLIGHT])),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


# ---- order -----------------------------------------------------------------------------------------------------


def test_the_first_reason_to_refuse_wins_from_the_outside_in() -> None:
    large = (b"content-length", b"99999999")
    edge = make_edge(api_keys="key-one", rate_limit="1/minute")
    assert [edge.post("/x", large).status for _ in range(3)] == [401, 401, 401]  # and no rate is used up
    assert edge.post("/x", bearer("key-one"), large).status == 413
    assert edge.post("/x", bearer("key-one"), large).status == 429
    foreign = make_edge(rate_limit="1/minute").post("/admin", large, host=with_host(b"example.org"))
    assert foreign.error["code"] == "host_not_allowed"


# ---- bodies ----------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413_by_its_length_or_as_it_grows() -> None:
    edge = make_edge(max_body_bytes=2048)
    declared = edge.post("/v1/moderations", (b"content-length", b"2049"))
    assert (declared.status, declared.reads) == (413, 0)
    for headers in (
        (),
        ((b"transfer-encoding", b"chunked"),),
        ((b"content-length", b"12"),),
        ((b"content-length", b"x"),),
    ):
        grown = edge.post("/v1/moderations", *headers, chunks=[b"x" * 512] * 5 + [b"x" * 512] * 100)
        assert grown.status == 413
        assert grown.reads == 5
        assert grown.error["code"] == "request_too_large"
        assert grown.headers["connection"] == "close"
    assert edge.refusals("size") == 5
    assert edge.post("/v1/moderations", chunks=[b"x" * 512] * 4).body == b"2048"


@pytest.mark.parametrize("drip", [b"", b"x"])
@pytest.mark.parametrize("chunks", [[], [b"{"], [b"{"] * 20])
def test_a_body_that_does_not_end_is_408(chunks: list[bytes], drip: bytes) -> None:
    edge = make_edge(request_timeout=0.05)
    answer = edge.post("/v1/moderations", chunks=chunks, complete=False, drip=drip)
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"
    assert edge.refusals("timeout") == 1
    assert edge.limiter.open == 0


def test_a_body_that_stops_on_a_real_socket_is_408_and_the_end_of_the_connection() -> None:
    edge = make_edge(request_timeout=0.2)

    async def run() -> bytes:
        async with serving(edge) as (host, port):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"POST /v1/moderations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
            try:
                return await asyncio.wait_for(reader.read(), PATIENCE)
            finally:
                writer.close()

    received = asyncio.run(run())
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in received
    assert b"\r\nserver:" not in received.lower()


def test_once_the_body_is_complete_the_connection_may_stay_open() -> None:
    async def run() -> list[str]:
        messages = [{"type": "http.request", "body": b"x", "more_body": False}]
        seen: list[str] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.extend([(await receive())["type"], (await receive())["type"]])

        scope = {"type": "http", "headers": [], "sailguard.record": Record("r")}
        await BodyLimit(app, limit=10, seconds=0.01)(scope, receive, None)  # type: ignore[arg-type]
        return seen

    assert asyncio.run(run()) == ["http.request", "http.disconnect"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 64 + b"]" * 64, 200),
        (b"[" * 65 + b"]" * 65, 400),
        (b'{"a":' * 64 + b"1" + b"}" * 64, 200),
        (b'{"a":' * 65 + b"1" + b"}" * 65, 400),
        (b'[{"a":' * 33 + b"1" + b"}]" * 33, 400),
        (b"[" * 100_000, 400),
        (json.dumps(["[" * 1000] * 10).encode(), 200),
        (json.dumps([[]] * 1000).encode(), 200),
        (b"NaN", 400),
        (b"\xff", 400),
    ],
)
def test_json_has_a_deepest_level(body: bytes, status: int) -> None:
    assert make_edge().post("/json", JSON, chunks=[body]).status == status


# ---- headers, log and metrics ----------------------------------------------------------------------------------

SECURE = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}


def test_every_answer_has_the_security_headers() -> None:
    edge = make_edge(api_keys="key-one", rate_limit="2/minute")
    key = bearer("key-one")
    answers = [edge.get("/v1/models", key), edge.get("/v1/models"), edge.get("/fails", key), edge.get("/x", key)]
    assert [answer.status for answer in answers] == [200, 401, 500, 429]
    answers += [make_edge().get(host=None), make_edge(max_body_bytes=1024).post("/x", chunks=[b"x" * 2000])]
    for answer in answers:
        assert SECURE.items() <= answer.headers.items()
        assert "server" not in answer.headers


def test_a_page_may_say_what_it_loads_and_keeps_the_rest() -> None:
    headers = make_edge().get("/page").headers
    assert headers["content-security-policy"] == "default-src 'self'"
    assert headers["x-frame-options"] == "DENY"


def test_request_ids_are_the_servers_own() -> None:
    edge = make_edge()
    given = [(b"x-request-id", b"req_forged"), (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01")]
    ids = {edge.get("/v1/models", *given).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert "req_forged" not in ids
    assert "forged" not in edge.text.getvalue()
    assert "a" * 32 not in edge.text.getvalue()


def test_the_log_names_the_key_by_its_id_and_holds_no_text() -> None:
    edge = make_edge(api_keys="key-one", admin_keys="key-two")
    edge.post("/v1/moderations", bearer("key-one"), chunks=[b"confidential"])
    edge.get("/v1/confidential", bearer("key-two"))
    edge.get("/admin/confidential", bearer("key-one"))
    edge.get("/fails", bearer("key-one"))
    edge.get("/confidential")
    one, two = (f"key-{hashlib.sha256(key).hexdigest()[:8]}" for key in (b"key-one", b"key-two"))
    assert [entry["key_id"] for entry in edge.log] == [one, two, one, one, None]
    assert [entry["status"] for entry in edge.log] == [200, 200, 403, 500, 401]
    assert "confidential" not in edge.text.getvalue()


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/v1/moderations", "moderations"),
        ("/v1/traces", "traces"),
        ("/v1/events", "events"),
        ("/v1/about", "about"),
        ("/v1/stats", "stats"),
        ("/v1/compare", "compare"),
        ("/v1/playground", "playground"),
        ("/", None),
        ("/ui/js/app.js", None),
        ("/v1/features", "features"),
        ("/v1/features/L15/7", "features"),
        ("/v1/models", "models"),
        ("/v1/models/tiny", "models"),
        ("/admin/bank", "admin"),
        ("/v1/moderations/x", None),
        ("/administration", None),
        ("/healthz", None),
        ("/metrics", None),
    ],
)
def test_requests_are_counted_under_their_endpoints_short_name(path: str, endpoint: str | None) -> None:
    edge = make_edge(admin_keys="key-one", host="0.0.0.0")
    during: list[float | None] = []

    def look() -> None:
        during.append(edge.metrics.registry.get_sample_value("sailguard_requests_in_flight"))

    edge.get(path, bearer("key-one"), while_open=look)
    counted = [
        (sample.labels["endpoint"], sample.value)
        for family in edge.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sailguard_request_seconds_count"
    ]
    assert counted == ([(endpoint, 1.0)] if endpoint else [])
    assert during[0] == (1.0 if endpoint else 0.0)
    assert edge.metrics.registry.get_sample_value("sailguard_requests_in_flight") == 0.0

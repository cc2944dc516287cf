"""Keys open what their role may do and nothing else; they never get out; a bad keys file changes nothing."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from service.auth import (
    KEYLESS,
    KeyRing,
    Principal,
    Role,
    permits,
    principal_of,
    privileged,
    require_admin,
    require_privileged,
)
from service.errors import ApiError, SettingsError
from service.key_file import KeyFile, hashed_line
from tests.service.edges import bearer, make_edge, write_keys

KEYS = {"client": "key-of-a-client", "reader": "key-of-a-reader", "admin": "key-of-an-admin"}


def line(key: str, key_id: str, role: str, **limits: Any) -> str:
    return hashed_line(key, Principal(key_id=key_id, role=Role(role), **limits))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A keys file with one hashed key of each role."""
    return write_keys(tmp_path / "keys", *(line(key, f"the-{role}", role) for role, key in KEYS.items()))


# ---- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"a", b"b", b"c", b"none"])
def test_every_key_is_compared_in_constant_time_as_a_digest(monkeypatch: pytest.MonkeyPatch, key: bytes) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert (KeyRing(["a", "b", "c"]).identify(key) is not None) == (key != b"none")
    assert len(compared) == 3
    assert all(len(left) == len(right) == 32 for left, right in compared)


def test_a_plain_key_is_known_by_the_start_of_its_digest() -> None:
    principal = KeyRing(["key-one"], admins=["key-two"]).identify(b"key-two")
    assert principal == Principal(key_id=f"key-{hashlib.sha256(b'key-two').hexdigest()[:8]}", role=Role.ADMIN)


def test_a_hashed_key_opens_with_its_id_role_and_limits(tmp_path: Path) -> None:
    path = write_keys(
        tmp_path / "keys",
        "# the teams",
        line("secret", "team-a", "reader", rate="600/minute", concurrent=8),
        "",
        "open",
    )
    ring = KeyRing(file=path)
    assert len(ring) == 2
    assert ring.identify(b"secret") == Principal(key_id="team-a", role=Role.READER, rate="600/minute", concurrent=8)
    plain = ring.identify(b"open")
    assert plain is not None
    assert plain.role is Role.CLIENT
    for key in (b"", b"SECRET", b"team-a", path.read_bytes().splitlines()[1], hashlib.sha256(b"secret").digest()):
        assert ring.identify(key) is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sha256:", "64 hexadecimal"),
        ("sha256:00 team client", "64 hexadecimal"),
        (f"sha256:{'0' * 64}", "an id and a role"),
        (f"sha256:{'0' * 64} team", "an id and a role"),
        (f"sha256:{'0' * 64} te/am client", "an id is"),
        (f"sha256:{'0' * 64} {'a' * 65} client", "an id is"),
        (f"sha256:{'0' * 64} team root", "client, reader, admin"),
        (f"sha256:{'0' * 64} team client rate=fast", "600/minute"),
        (f"sha256:{'0' * 64} team client rate=0/minute", "1 to 100000"),
        (f"sha256:{'0' * 64} team client concurrent=0", "from 1"),
        (f"sha256:{'0' * 64} team client concurrent=many", "from 1"),
        (f"sha256:{'0' * 64} team client concurrent=1 concurrent=2", "each once"),
        (f"sha256:{'0' * 64} team client colour=blue", "each once"),
        ("secret key", "visible ASCII"),
        ("secret\u00e9", "visible ASCII"),
        ("s" * 513, "visible ASCII"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_by_number_and_not_quoted(tmp_path: Path, text: str, part: str) -> None:
    path = write_keys(tmp_path / "keys", "# first", text)
    with pytest.raises(SettingsError, match="line 2") as caught:
        KeyRing(file=path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "0" * 64 not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("setting", ["clients", "admins"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted(setting: str) -> None:
    keys = ["fine", "secret key"]
    with pytest.raises(SettingsError, match="key 2") as caught:
        KeyRing(keys) if setting == "clients" else KeyRing(admins=keys)
    assert "secret" not in str(caught.value)


def test_one_key_with_two_owners_and_one_id_with_two_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="are one"):
        KeyRing(["same"], admins=["same"])
    path = write_keys(tmp_path / "keys", line("same", "team-a", "client"))
    with pytest.raises(SettingsError, match=r"team-a.*are one"):
        KeyRing(["same"], file=path)
    write_keys(path, line("one", "team-a", "client"), line("two", "team-a", "client"))
    with pytest.raises(SettingsError, match="'team-a' stands there twice"):
        KeyRing(file=path)
    assert len(KeyRing(["same", "same"])) == 1


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyRing(file=file)


def test_plain_keys_that_others_can_read_are_warned_of(file: Path) -> None:
    file.chmod(0o644)
    assert KeyRing(file=file).warnings == ()
    with file.open("a") as lines:
        lines.write("plain\n")
    (warning,) = KeyRing(file=file).warnings
    assert str(file) in warning
    (first,) = make_edge(api_keys_file=file).log
    assert first == {"event": warning, "level": "warning"}
    file.chmod(0o640)
    assert KeyRing(file=file).warnings == ()


def test_a_file_that_is_no_text_or_endless_is_refused(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        KeyRing(file=path)
    path.write_bytes(b"#" * (1024 * 1024 + 1))
    with pytest.raises(SettingsError, match="larger"):
        KeyRing(file=path)
    with pytest.raises(SettingsError, match="cannot read"):
        KeyRing(file=tmp_path)


def test_ring_and_entries_show_neither_keys_nor_digests() -> None:
    ring = KeyRing(["key-one"], admins=["key-two"])
    shown = repr(vars(ring))
    assert "key-one" not in shown
    assert "key-two" not in shown
    assert hashlib.sha256(b"key-one").hexdigest()[8:] not in shown


# ---- re-reading ------------------------------------------------------------------------------------------------


def test_a_changed_file_is_taken_up_and_an_unchanged_one_is_not_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing(["fixed"], file=file)
    with monkeypatch.context() as patch:
        patch.setattr(KeyFile, "read", None)
        assert not ring.refresh()
    write_keys(file, line("new", "team-n", "client"))
    assert ring.refresh()
    assert ring.identify(b"new") == Principal(key_id="team-n", role=Role.CLIENT)
    assert ring.identify(KEYS["client"].encode()) is None
    assert ring.identify(b"fixed") is not None
    assert not ring.has_admin
    assert not ring.refresh()
    os.utime(file)
    assert not ring.refresh()  # read again, and the same


def test_a_bad_new_file_is_refused_once_and_the_old_keys_stay(file: Path) -> None:
    ring = KeyRing(file=file)
    for spoil in (
        lambda: write_keys(file, "not a key"),
        lambda: file.chmod(0o666),
        lambda: write_keys(file, line("x", "a", "client"), line("y", "a", "client")),
        file.unlink,
    ):
        spoil()
        with pytest.raises(SettingsError):
            ring.refresh()
        assert not ring.refresh()
        assert all(ring.identify(key.encode()) for key in KEYS.values())
    write_keys(file, "fine")
    assert ring.refresh()
    assert len(ring) == 1


def test_when_the_last_key_is_revoked_nothing_is_open(file: Path) -> None:
    edge = make_edge(api_keys_file=file)
    assert edge.get("/v1/models", bearer(KEYS["client"])).status == 200
    write_keys(file, "# nobody")
    assert edge.keys.refresh()
    for key in KEYS.values():
        assert edge.get("/v1/models", bearer(key)).status == 401
    assert edge.get("/v1/models").status == 401
    with pytest.raises(SettingsError, match="holds no key"):
        KeyRing(file=file)


def test_a_running_server_takes_up_what_was_read_again(file: Path) -> None:
    edge = make_edge(api_keys_file=file)
    write_keys(file, line("another", "team-b", "admin"))
    assert edge.get("/admin/bank", bearer("another")).status == 401
    assert edge.keys.refresh()
    assert edge.get("/admin/bank", bearer("another")).status == 200
    assert edge.get("/v1/models", bearer(KEYS["client"])).status == 401


# ---- roles -----------------------------------------------------------------------------------------------------

ALL = {"client", "reader", "admin"}
USERS = {"client", "admin"}
TABLE = [
    ("POST", "/v1/chat/completions", USERS),
    ("POST", "/v1/completions", USERS),
    ("POST", "/v1/moderations", USERS),
    ("POST", "/v1/traces", USERS),
    ("GET", "/v1/models", ALL),
    ("GET", "/v1/models/one/two", ALL),
    ("POST", "/v1/models", USERS),
    ("GET", "/v1/features", ALL),
    ("GET", "/v1/features/L15/7", ALL),
    ("POST", "/v1/features", USERS),
    ("GET", "/v1/events", {"reader", "admin"}),
    ("GET", "/v1/events/", {"reader", "admin"}),
    ("POST", "/v1/events", {"admin"}),
    ("GET", "/v1/about", ALL),
    ("GET", "/v1/stats", ALL),
    ("POST", "/v1/stats", USERS),
    ("GET", "/v1/compare", USERS),
    ("POST", "/v1/compare", USERS),
    ("POST", "/v1/playground", USERS),
    ("POST", "/admin/reviews", {"admin"}),
    ("GET", "/admin/audit", {"admin"}),
    ("GET", "/ui", USERS),
    ("GET", "/ui/no-such-file.js", USERS),
    ("GET", "/index.html", USERS),
    ("GET", "/metrics", ALL),
    ("GET", "/openapi.json", USERS),
    ("GET", "/docs", USERS),
    ("GET", "/v1/eventsource", USERS),
    ("GET", "/admin", {"admin"}),
    ("GET", "/admin/", {"admin"}),
    ("GET", "/admin/bank", {"admin"}),
    ("POST", "/admin/bank/reload", {"admin"}),
    ("POST", "/admin/policy/promote", {"admin"}),
    ("DELETE", "/admin/policy", {"admin"}),
    ("GET", "/healthz", ALL | {"nobody"}),
    ("GET", "/readyz", ALL | {"nobody"}),
]


@pytest.mark.parametrize(("method", "path", "roles"), TABLE)
def test_a_role_opens_what_it_may_and_nothing_else(file: Path, method: str, path: str, roles: set[str]) -> None:
    edge = make_edge(api_keys_file=file, host="0.0.0.0")
    for role in (*KEYS, "nobody"):
        headers = [bearer(KEYS[role])] if role in KEYS else []
        answer = edge.get(path, *headers) if method == "GET" else edge.post(path, *headers)
        if role in roles:
            assert answer.status in (200, 405), role  # the path is there for some methods only
        elif role == "nobody":
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        else:
            assert (answer.status, answer.error["code"]) == (403, "insufficient_permissions")
            assert answer.reads == 0
    refused = len({*KEYS, "nobody"} - roles)
    assert edge.refusals("auth") == refused
    assert len(edge.reached) == 4 - refused


@given(path=st.text(max_size=20), method=st.text(max_size=8), role=st.sampled_from(Role))
def test_only_administrators_get_below_admin_and_readers_only_read(path: str, method: str, role: Role) -> None:
    assert permits(role, method, f"/admin/{path}") == (role is Role.ADMIN)
    assert not permits(Role.READER, method, path) or method in ("GET", "HEAD")


def test_admin_is_closed_without_a_key_for_it(file: Path) -> None:
    for edge, headers in (
        (make_edge(), []),
        (make_edge(api_keys="key-one"), [bearer("key-one")]),
    ):
        answer = edge.get("/admin/bank", *headers)
        assert (answer.status, answer.error["code"]) == (403, "admin_closed")
        assert "SAILGUARD_ADMIN_KEYS" in answer.error["message"]
        assert edge.reached == []
        assert edge.get("/v1/models", *headers).status == 200
    assert make_edge(api_keys="key-one").get("/admin/bank").status == 401
    assert make_edge(admin_keys="key-two").get("/admin/bank", bearer("key-two")).status == 200


def test_admin_routes_have_a_second_lock() -> None:
    def request(principal: Principal | None) -> Request:
        return Request({"type": "http", "headers": [], "sailguard.principal": principal})

    for principal in (None, Principal(key_id="a", role=Role.CLIENT), Principal(key_id="a", role=Role.READER)):
        with pytest.raises(ApiError) as caught:
            require_admin(request(principal))
        assert caught.value.status_code == 403
    require_admin(request(Principal(key_id="a", role=Role.ADMIN)))
    assert principal_of(Request({"type": "http", "headers": []})) is None


def test_privileged_is_an_admin_key_or_a_server_without_any_keys() -> None:
    def request(principal: Principal | None, **scope: object) -> Request:
        return Request({"type": "http", "headers": [], "sailguard.principal": principal, **scope})

    refused = [
        request(None),
        request(None, **{KEYLESS: False}),
        *(request(Principal(key_id="a", role=role)) for role in (Role.CLIENT, Role.READER)),
        request(Principal(key_id="a", role=Role.CLIENT), **{KEYLESS: True}),
    ]
    for one in refused:
        assert not privileged(one)
        with pytest.raises(ApiError) as caught:
            require_privileged(one)
        assert (caught.value.status_code, caught.value.code) == (403, "insufficient_permissions")
        assert "admin key" in caught.value.message
    for one in (request(None, **{KEYLESS: True}), request(Principal(key_id="a", role=Role.ADMIN))):
        assert privileged(one)
        require_privileged(one)


def test_a_prefix_that_the_server_is_mounted_under_hides_no_admin_path(file: Path) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    outer = FastAPI()
    outer.mount("/guard", make_edge(api_keys_file=file).app)
    client = TestClient(outer, headers={"Authorization": f"Bearer {KEYS['client']}"})
    assert client.get("/guard/v1/models").status_code == 200
    assert client.get("/guard/admin/bank").status_code == 403


# ---- headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer wrong"],
        [b"Basic key-one"],
        [b"key-one"],
        [b"Bearer key-one x"],
        [b"Bearer key-one, Bearer key-one"],
        [b"Bearer key-one", b"Bearer key-one"],
        [b"Bearer wrong", b"Bearer key-one"],
        [b"Bearer key-one", b""],
        [b"Bearer\tkey-one"],
        [b"Bearer " + b"x" * 60_000],
        [b"Bearer \xff\x00"],
    ],
)
def test_anything_but_one_accepted_key_is_401(values: list[bytes]) -> None:
    edge = make_edge(api_keys="key-one")
    answer = edge.post("/v1/moderations", *((b"authorization", value) for value in values))
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.reads == 0
    assert edge.reached == []


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.binary(max_size=64) | st.binary(max_size=16).map(lambda key: b"Bearer " + key), max_size=3))
@example([b"Bearer key-one"])
def test_no_authorization_header_is_a_server_error(values: list[bytes]) -> None:
    edge = make_edge(api_keys="key-one")
    answer = edge.get("/v1/models", *((b"authorization", value) for value in values))
    right = len(values) == 1 and values[0].lower().startswith(b"bearer ") and values[0][7:].strip() == b"key-one"
    assert answer.status == (200 if right else 401)


FRAGMENTS = st.sampled_from(
    [
        "sha256:",
        "sha256:" + "ab" * 32,
        "secret-1",
        "team",
        "client",
        "admin",
        "rate=1/minute",
        "rate=",
        "concurrent=2",
        "#",
    ]
)
LINES = st.lists(FRAGMENTS | st.text(max_size=6), max_size=6).map(" ".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80) | st.lists(LINES, max_size=4).map(lambda found: "\n".join(found).encode()))
def test_any_keys_file_is_used_or_refused_with_one_error_that_quotes_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    path.chmod(0o600)
    problem = ""
    try:
        ring = KeyRing(file=path)
    except SettingsError as error:
        problem = str(error)
    else:
        assert len(ring) > 0
        assert ring.identify(b"") is None
        found = ring.identify(b"secret-1")
        assert found is None or found.role is Role.CLIENT
    assert "secret-1" not in problem
    assert "ab" * 32 not in problem


def test_no_key_and_no_digest_is_in_logs_answers_or_metrics(file: Path) -> None:
    edge = make_edge(api_keys="key-plain", api_keys_file=file, rate_limit="5/minute")
    secrets = ["key-plain", "not-a-key", *KEYS.values()]
    bodies = b""
    for key in secrets:
        for path in ("/v1/models", "/admin/bank", "/v1/events", "/fails", "/metrics"):
            bodies += edge.get(path, bearer(key)).body
    shown = edge.text.getvalue() + bodies.decode() + edge.metrics.render().decode()
    for key in secrets:
        assert key not in shown
        assert hashlib.sha256(key.encode()).hexdigest()[8:] not in shown
    plain_id = f"key-{hashlib.sha256(b'key-plain').hexdigest()[:8]}"
    assert {entry.get("key_id") for entry in edge.log} == {None, plain_id, "the-client", "the-reader", "the-admin"}
    assert plain_id not in edge.metrics.render().decode()

"""Settings refuse what is unsafe; keys guard what they should. What keys open in detail: test_auth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.errors import SailguardError
from service.errors import SettingsError
from service.settings import Settings, is_loopback
from tests.service.edges import write_keys

URL = "/v1/chat/completions"


def test_the_shipped_bank_may_be_named() -> None:
    assert Settings(bank="shipped").bank is None
    assert Settings(bank="folder").bank == Path("folder")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_host_that_others_can_reach_needs_keys(host: str) -> None:
    with pytest.raises(SettingsError, match="API_KEYS") as caught:
        Settings(host=host)
    assert isinstance(caught.value, SailguardError)
    assert isinstance(caught.value, ValueError)
    assert Settings(host=host, api_keys="key-1").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert not Settings(host=host).key_ring()


def test_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILGUARD_PORT", "9000")
    monkeypatch.setenv("SAILGUARD_MAX_QUEUE", "3")
    settings = Settings(max_queue=5)
    assert (settings.port, settings.max_queue) == (9000, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "abc"), ("port", 70000), ("max_queue", -1), ("max_body_bytes", 0), ("max_new_tokens", 0)],
)
def test_wrong_value_is_named_with_its_variable(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"'{name}'.*SAILGUARD_{name.upper()}"):
        Settings(**{name: value})


def test_unknown_setting_is_refused() -> None:
    with pytest.raises(SettingsError, match="'prot'"):
        Settings(prot=1)


def test_keys_never_show_in_text_or_errors() -> None:
    assert "key-one" not in repr(Settings(api_keys="key-one"))
    with pytest.raises(SettingsError) as caught:
        Settings(api_keys="key-one", port="abc")
    assert "key-one" not in str(caught.value)
    assert "key-one" not in repr(vars(Settings(api_keys="key-one").key_ring()))


def test_keys_come_from_list_and_file_together(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys", "# team a", "key-three", "", " key-four ")
    settings = Settings(api_keys=" key-one, key-two,,", admin_keys="key-five", api_keys_file=file)
    ring = settings.key_ring()
    assert len(ring) == 5
    for key in (b"key-one", b"key-two", b"key-three", b"key-four"):
        found = ring.identify(key)
        assert found is not None
        assert found.role == "client"
    for key in (b"", b"key", b"key-one,key-two", b"# team a", b"KEY-ONE"):
        assert ring.identify(key) is None
    assert ring.has_admin
    assert settings.keys() == ["key-one", "key-two", "key-three", "key-four"]


def test_keys_that_are_hashed_cannot_be_handed_on(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys", f"sha256:{'ab' * 32} team-a client")
    settings = Settings(host="0.0.0.0", api_keys_file=file)
    assert len(settings.key_ring()) == 1
    with pytest.raises(SettingsError, match="hashed") as caught:
        settings.keys()
    assert "ab" * 32 not in str(caught.value)


def test_an_admin_key_alone_guards_everything() -> None:
    assert Settings(host="0.0.0.0", admin_keys="key-one").key_ring()


def test_key_file_that_is_missing_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        Settings(api_keys_file=tmp_path / "none").key_ring()
    write_keys(tmp_path / "empty", "# nothing")
    with pytest.raises(SettingsError, match="holds no key"):
        Settings(host="0.0.0.0", api_keys_file=tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate_limit", "fast"),
        ("rate_limit", "0/minute"),
        ("rate_limit", "1/minute;1/hour"),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "http://guard.local"),
        ("allowed_hosts", "guard.local:8801"),
        ("cors_origins", "*"),
        ("cors_origins", "null"),
        ("cors_origins", "chat.example.org"),
        ("cors_origins", "https://chat.example.org/"),
        ("cors_origins", "https://Chat.example.org"),
        ("cors_origins", "https://*.example.org"),
    ],
)
def test_limits_hosts_and_origins_that_cannot_work_are_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"'{name}'"):
        Settings(**{name: value})


def test_hosts_and_origins_are_read_as_lists() -> None:
    settings = Settings(
        allowed_hosts=" Guard.local,other ,", cors_origins="https://a.example, http://localhost:3000,http://[::1]:1"
    )
    assert settings.host_names == {"guard.local", "other"}
    assert settings.origins == ("https://a.example", "http://localhost:3000", "http://[::1]:1")
    assert Settings(rate_limit="600/minute").rate_limit == "600/minute"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic key-one", "key-one", "Bearer key-one x"]
)
def test_without_an_accepted_key_nothing_but_health_answers(
    make_app: Callable[..., Any], engine: Any, chat: Callable[..., Any], header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    with TestClient(make_app(api_keys="key-one", host="0.0.0.0"), headers=headers) as client:
        answers = [
            client.post(URL, json=chat()),
            client.post(URL, content=b"{"),
            client.post("/v1/moderations", json={"input": "x"}),
            client.get("/v1/models"),
            client.get("/metrics"),
            client.get("/openapi.json"),
            client.get("/nothing"),
        ]
        for answer in answers:
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    assert engine.calls == []


def test_accepted_key_opens_everything(make_app: Callable[..., Any], chat: Callable[..., Any]) -> None:
    headers = {"Authorization": "bearer key-two"}
    with TestClient(make_app(api_keys="key-one,key-two", host="0.0.0.0"), headers=headers) as client:
        assert client.post(URL, json=chat()).status_code == 200
        assert client.get("/metrics").status_code == 200


def test_metrics_are_open_on_loopback_even_with_keys(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(api_keys="key-one")) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401

"""Settings refuse what is unsafe; keys are compared as digests and guard what they should."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.errors import SailguardError
from service.errors import SettingsError
from service.settings import KeyRing, Settings, is_loopback

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
    file = tmp_path / "keys"
    file.write_text("# team a\nkey-three\n\n key-four \n", encoding="utf-8")
    ring = Settings(api_keys=" key-one, key-two,,", api_keys_file=file).key_ring()
    assert len(ring) == 4
    for key in (b"key-one", b"key-two", b"key-three", b"key-four"):
        assert ring.accepts(key)
    for key in (b"", b"key", b"key-one,key-two", b"# team a", b"KEY-ONE"):
        assert not ring.accepts(key)


def test_key_file_that_is_missing_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        Settings(api_keys_file=tmp_path / "none").key_ring()
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="holds no key"):
        Settings(host="0.0.0.0", api_keys_file=tmp_path / "empty")


def test_every_key_is_compared_in_constant_time_as_a_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert KeyRing(["a", "b", "c"]).accepts(b"a")
    assert len(compared) == 3
    assert all(len(left) == len(right) == 32 for left, right in compared)


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

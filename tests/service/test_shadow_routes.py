"""`/admin/shadow` and answers under it: the same to the byte, whatever the candidate does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feature_bank.bank import shipped_bank_path
from feature_bank.versions import VersionStore
from guard.metrics import Metrics
from tests.service.file_engine import FileEngine

KEY, CLIENT_KEY = "an-admin-key-for-tests", "a-client-key-for-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
PATIENCE = 20.0


def answers(client: TestClient) -> list[str]:
    """What two requests are answered with, but for the ids that every answer makes anew."""
    judged = client.post("/v1/moderations", json={"input": ["a bird", "a BLOCK of stone"]})
    traced = client.post("/v1/traces", json={"input": "a bird"})
    return [re.sub(r"modr-[0-9a-f]+", "modr-", reply.text) for reply in (judged, traced)]


def texts_of(client: TestClient, name: str, count: int) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while True:
        found: dict[str, Any] = client.get("/admin/shadow").json()
        if found["shadow"][name] >= count:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_no_byte_of_an_answer_depends_on_the_shadow_or_its_errors(
    make_app: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(make_app(api_keys=CLIENT_KEY, admin_keys=KEY), headers=ADMIN) as client:
        plain = answers(client)
        assert client.get("/admin/shadow").json()["shadow"] is None
    with TestClient(make_app(api_keys=CLIENT_KEY, admin_keys=KEY, shadow=shipped_bank_path()), headers=ADMIN) as client:
        assert answers(client) == plain
        texts_of(client, "texts", 3)
    monkeypatch.setattr("service.shadow.StreamJudge", lambda *_: 1 / 0)
    with TestClient(make_app(api_keys=CLIENT_KEY, admin_keys=KEY, shadow=shipped_bank_path()), headers=ADMIN) as client:
        assert answers(client) == plain
        texts_of(client, "errors", 3)
        assert 'sailguard_shadow_texts_total{result="error"} 3.0' in client.get("/metrics").text


def test_a_candidate_that_cannot_be_used_keeps_nothing_from_serving(
    make_app: Callable[..., Any], tmp_path: Path
) -> None:
    with TestClient(make_app(api_keys=CLIENT_KEY, admin_keys=KEY, shadow=tmp_path / "none"), headers=ADMIN) as client:
        assert answers(client)
        assert client.get("/admin/shadow").json()["shadow"] is None


def test_a_version_of_the_store_is_put_beside_the_current_one_and_taken_away(
    make_app: Callable[..., Any], bank: Path, write_bank: Callable[..., Path], tmp_path: Path
) -> None:
    store = VersionStore(tmp_path / "store")
    store.promote(bank)
    candidate = store.promote(write_bank(tmp_path / "other", explanation="written anew")).version
    store.rollback()
    engine = FileEngine.start(store.folder, None, Metrics())
    app = make_app(engine, bank=store.folder, api_keys=CLIENT_KEY, admin_keys=KEY)
    with TestClient(app, headers=ADMIN) as client:
        found = client.post("/admin/shadow", json={"version": candidate}).json()
        assert found["shadow"]["candidate"] == candidate
        assert found["current"] == store.current
        assert candidate in found["promote"]
        assert client.post("/admin/shadow", json={"version": "none"}).status_code == 404
        assert client.get("/admin/shadow").json()["shadow"]["candidate"] == candidate
        assert client.post("/admin/shadow", json={"version": None}).json()["shadow"] is None
        client.headers["Authorization"] = f"Bearer {CLIENT_KEY}"
        assert client.get("/admin/shadow").status_code == 403


def test_without_a_store_no_candidate_can_be_named_from_afar(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(api_keys=CLIENT_KEY, admin_keys=KEY), headers=ADMIN) as client:
        reply = client.post("/admin/shadow", json={"version": "any"})
        assert reply.status_code == 409
        assert reply.json()["error"]["code"] == "no_bank_store"

"""`/v1/traces`: token by token what the guard sees, bounded, and audited like any other judgement."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from guard.metrics import Metrics
from service.audit import Audit
from service.routes.traces import TraceResponse
from tests.service.file_engine import FileEngine

URL = "/v1/traces"


def test_every_token_is_traced_in_order(client: TestClient, engine: Any) -> None:
    response = client.post(URL, json={"input": "a small bird with violence"})
    assert response.status_code == 200
    body = response.json()
    assert [token["text"] for token in body["tokens"]] == ["a", "small", "bird", "with", "violence"]
    assert [token["index"] for token in body["tokens"]] == [0, 1, 2, 3, 4]
    assert body["tokens"][0]["features"][0]["id"] == "L15/7"
    assert (body["object"], body["model"], body["role"]) == ("trace", engine.model_id, "prompt")
    assert (body["truncated"], body["score"]["action"]) == (False, "block")
    assert body["sailguard"] == {"bank": engine.bank_version, "policy": engine.policy_version}
    assert response.headers["X-Sailguard-Action"] == "block"


def test_answers_have_the_documented_shape(client: TestClient) -> None:
    body = client.post(URL, json={"input": "violence \udc00 ä".encode(errors="replace").decode()}).json()
    assert TraceResponse.model_validate(body, strict=False).model_dump(mode="json") == body


@pytest.mark.parametrize("role", ["prompt", "response", "passage"])
def test_the_role_reaches_the_engine(
    client: TestClient, engine: Any, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    trace = engine.trace
    monkeypatch.setattr(engine, "trace", lambda text, role: (seen.append(role), trace(text, role))[1])
    assert client.post(URL, json={"input": "a bird", "role": role}).json()["role"] == role
    assert seen == [role]


def test_a_long_text_is_traced_to_the_limit_and_says_so(make_app: Callable[..., Any]) -> None:
    with TestClient(make_app(max_input_tokens=64)) as client:
        body = client.post(URL, json={"input": "word " * 65}).json()
        assert (len(body["tokens"]), body["truncated"]) == (64, True)
        body = client.post(URL, json={"input": "word " * 64}).json()
        assert (len(body["tokens"]), body["truncated"]) == (64, False)


def test_what_the_engine_cut_is_reported(client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = engine.trace

    def cut(text: str, role: str) -> Any:
        whole = trace(text, role)
        return replace(whole, score=replace(whole.score, truncated=True))

    monkeypatch.setattr(engine, "trace", cut)
    assert client.post(URL, json={"input": "a bird"}).json()["truncated"] is True


@pytest.mark.parametrize(
    "body", [{}, {"input": 1}, {"input": ["a"]}, {"input": "a", "role": "system"}, {"text": "a"}, []]
)
def test_malformed_bodies_are_refused(client: TestClient, body: Any) -> None:
    response = client.post(URL, json=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_text_that_is_no_unicode_is_traced(client: TestClient) -> None:
    content = b'{"input": "a \\ud800 bird"}'
    response = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_nothing_is_traced_without_a_guard(make_app: Callable[..., Any]) -> None:
    app = make_app()
    with TestClient(app) as client:
        app.state.services.slot.fail("still loading")
        assert client.post(URL, json={"input": "a bird"}).status_code == 503


def test_a_verdict_of_a_trace_is_audited(make_app: Callable[..., Any], tmp_path: Path) -> None:
    app = make_app(audit=tmp_path / "audit.db")
    with TestClient(app) as client:
        client.post(URL, json={"input": "a bird"})
        client.post(URL, json={"input": "violence and terror"})
        audit = app.state.services.audit
        assert isinstance(audit, Audit)
    import sqlite3

    with sqlite3.connect(tmp_path / "audit.db") as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = sum(
            database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables if "verdict" in name
        )
    database.close()
    assert rows == 2


def test_the_text_is_never_logged(client: TestClient, log: Any) -> None:
    client.post(URL, json={"input": "violence of a certain heron"})
    assert "heron" not in log.getvalue()
    assert json.loads(log.getvalue().splitlines()[-1])["action"] == "block"


def test_a_trace_names_the_versions_that_it_was_made_by(make_app: Callable[..., Any], bank: Path) -> None:
    engine = FileEngine.start(bank, None, Metrics())
    with TestClient(make_app(engine, bank=bank)) as client:
        body = client.post(URL, json={"input": "a bird"}).json()
    assert body["tokens"][0]["features"][0]["explanation"].split() == list(body["sailguard"].values())

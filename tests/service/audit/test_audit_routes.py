"""`/admin/audit`: every entry once and the newest first, for administrators alone; a minute's verdicts are counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from guard.events import FeatureHit
from service.audit_queries import history
from service.audit_store import insert, open_for_writing
from tests.service.audits import entry, stored

KEY, CLIENT_KEY = "an-admin-key-for-tests", "a-client-key-for-tests"
ADMIN = {"Authorization": f"Bearer {KEY}"}
URL = "/admin/audit"
DOMAINS = ("violence", "politics")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def start(make_app: Callable[..., Any], path: Path) -> Iterator[Callable[..., TestClient]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            app = make_app(**{"audit": path, "api_keys": CLIENT_KEY, "admin_keys": KEY, **settings})
            return stack.enter_context(TestClient(app, headers=ADMIN))

        yield make


def write(path: Path, *entries: Any, text: bool = False) -> None:
    with contextlib.closing(open_for_writing(path)) as connection:
        insert(connection, [one.row(text=text) for one in entries])


def pages(client: TestClient, **params: Any) -> list[dict[str, Any]]:
    """All entries, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        response = client.get(URL, params=params)
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        if not data:
            return found
        found += data
        params["before"] = data[-1]["id"]


def test_pages_show_every_entry_once_the_newest_first(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    write(path, *(entry(f"req_{number}") for number in range(23)))
    found = pages(client, limit=7)
    assert [one["request_id"] for one in found] == [f"req_{number}" for number in reversed(range(23))]
    for one, kept in zip(reversed(found), stored(path), strict=True):
        assert one == {name: value for name, value in kept.items() if name != "unix"} | {"type": "verdict"}


def test_entries_that_come_between_two_pages_move_none(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    write(path, *(entry(f"req_{number}") for number in range(4)))
    first = client.get(URL, params={"limit": 2}).json()["data"]
    write(path, entry("late"))
    second = client.get(URL, params={"limit": 2, "before": first[-1]["id"]}).json()["data"]
    assert [one["request_id"] for one in first + second] == ["req_3", "req_2", "req_1", "req_0"]


def test_entries_are_chosen_by_action_domain_request_and_time(start: Callable[..., TestClient], path: Path) -> None:
    client, now = start(), time.time()
    write(
        path,
        entry("a", action="flag", domain="politics", unix=now - 100),
        entry("b", action="block", domain="violence", unix=now - 50),
        entry("c", action="flag", domain="violence", unix=now - 10),
    )
    for params, expected in (
        ({"action": "flag"}, ["c", "a"]),
        ({"domain": "violence"}, ["c", "b"]),
        ({"action": "flag", "domain": "violence"}, ["c"]),
        ({"request_id": "b"}, ["b"]),
        ({"since": now - 60}, ["c", "b"]),
        ({"domain": "' OR 1 --"}, []),
    ):
        data = client.get(URL, params=params).json()["data"]
        assert [one["request_id"] for one in data] == expected, params


@pytest.mark.parametrize("kept", [False, True])
def test_texts_are_shown_where_they_are_kept(start: Callable[..., TestClient], kept: bool) -> None:
    client = start(audit_text=kept)
    client.post("/v1/moderations", json={"input": "violence in a film"})
    found = client.get(URL).json()
    assert found["kept"] is kept
    assert [one["text"] for one in found["data"]] == ["violence in a film" if kept else None]


def test_where_no_audit_is_kept_it_says_so(start: Callable[..., TestClient]) -> None:
    client = start(audit=None)
    for path in (URL, f"{URL}/history"):
        response = client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "no_audit")


def test_a_file_that_is_gone_is_no_error_of_the_servers(start: Callable[..., TestClient], path: Path) -> None:
    client = start()
    path.unlink()
    for address in (URL, f"{URL}/history"):
        response = client.get(address)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "audit_not_readable")


def test_only_an_administrator_reads_the_audit(start: Callable[..., TestClient]) -> None:
    client = start()
    for path in (URL, f"{URL}/history"):
        assert client.get(path, headers={"Authorization": f"Bearer {CLIENT_KEY}"}).status_code == 403
        assert client.get(path, headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize(
    "params", [{"limit": 0}, {"limit": 501}, {"before": -1}, {"action": "allow"}, {"since": "inf"}, {"since": "nan"}]
)
def test_what_cannot_be_asked_for_is_refused(start: Callable[..., TestClient], params: dict[str, Any]) -> None:
    assert start().get(URL, params=params).status_code == 400


# ---- history -----------------------------------------------------------------------------------------------------


def test_each_verdict_counts_in_its_minute_and_those_before_do_not(path: Path) -> None:
    now = 6000.5
    times = {5939.9: None, 5940.0: 0, 5999.999: 0, 6000.0: 1, 6000.4: 1}
    for unix in times:
        write(path, entry(unix=unix))
    found = history(path, minutes=2, now=now, domains=DOMAINS)
    assert found.start == 5940
    assert found.domains["violence"]["block"] == [2, 2]
    assert found.domains["violence"]["flag"] == found.domains["politics"]["steer"] == [0, 0]


def test_counts_add_up_to_the_entries_of_the_time(path: Path) -> None:
    now = time.time()
    for number in range(60):
        write(
            path,
            entry(
                unix=now - 37 * number,
                action=("flag", "steer", "block")[number % 3],
                domain=("violence", "politics", "")[number % 2],
            ),
        )
    found = history(path, minutes=60, now=now, domains=DOMAINS)
    counted = sum(sum(minutes) for actions in found.domains.values() for minutes in actions.values())
    assert counted == len(stored(path, since=found.start)) == 60
    assert all(len(minutes) == 60 for actions in found.domains.values() for minutes in actions.values())


def test_features_are_counted_once_a_verdict_with_their_last_explanation(path: Path) -> None:
    def hit(name: str, explanation: str) -> FeatureHit:
        return FeatureHit(id=name, layer=1, explanation=explanation, activation=1.0, contribution=1.0)

    write(path, entry(features=(hit("L1/1", "old"), hit("L1/2", "two"))))
    write(path, entry(features=(hit("L1/1", "new"),)))
    write(path, entry(features=()), entry(unix=time.time() - 7200, features=(hit("L1/3", "long ago"),)))
    found = history(path, minutes=60, now=time.time(), domains=DOMAINS)
    assert [(one.id, one.count, one.explanation) for one in found.features] == [("L1/1", 2, "new"), ("L1/2", 1, "two")]


def test_history_is_shown_for_every_domain_of_the_bank(start: Callable[..., TestClient], engine: Any) -> None:
    client = start()
    client.post("/v1/moderations", json={"input": ["violence", "terror"]})
    found = client.get(f"{URL}/history", params={"minutes": 5}).json()
    assert (found["object"], found["minutes"]) == ("history", 5)
    assert set(found["domains"]) == set(engine.bank.heads)
    assert [sum(found["domains"][domain]["block"]) for domain in ("violence", "terror", "politics")] == [1, 1, 0]
    assert found["features"] == [{"id": "L15/7", "count": 2, "explanation": "a weapon"}]
    for minutes in (0, 1441):
        assert client.get(f"{URL}/history", params={"minutes": minutes}).status_code == 400

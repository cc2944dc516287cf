"""What replicas behind Ray Serve answer, and what happens to requests while they are updated, or die."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from feature_bank.bank import Bank
from feature_bank.versions import VersionStore
from service.app import create_app
from service.settings import Settings
from service.sidecar import start_sidecar
from tests.service.cluster.conftest import ADMIN, CLIENT, PATIENCE, READER, Hammer, Served, bearer, comparable, wait_for
from tests.service.conftest import ServerThread

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]

TEXTS = {"input": ["a small bird", "nobody listened", "x " * 900], "role": "response"}


def versions(served: Served) -> tuple[str, str]:
    first, second, _ = (Bank.load(folder).version for folder in served.banks)
    return first, second


def all_use(served: Served, version: str, replicas: int = 2) -> bool:
    return list(served.banks_in_use().values()) == [version] * replicas


def test_replicas_answer_what_one_server_answers(served: Served, tmp_path: Path) -> None:
    values = {**served.settings.model_dump(), "port": 0, "audit": tmp_path / "audit.sqlite"}
    settings = Settings(**values)
    app = create_app(start_sidecar(settings), settings, generates=False)
    with ServerThread(app, settings) as url, httpx.Client(timeout=PATIENCE) as client:
        wait_for(lambda: client.get(f"{url}/readyz").status_code == 200)
        requests: list[tuple[str, str, Any, str]] = [
            ("POST", "/v1/moderations", TEXTS, CLIENT),
            ("POST", "/v1/traces", {"input": "a small bird"}, CLIENT),
            ("POST", "/v1/moderations", TEXTS, "a-wrong-key"),
            ("POST", "/v1/moderations", TEXTS, READER),
            ("POST", "/v1/moderations", {"input": []}, CLIENT),
            ("POST", "/v1/moderations", {"input": "x" * 70_000}, CLIENT),
            ("POST", "/v1/chat/completions", {}, CLIENT),
            ("POST", "/admin/bank/promote", {"version": "9.9"}, CLIENT),
            ("GET", "/v1/features?domain=violence", None, READER),
            ("GET", "/v1/events", None, CLIENT),
            ("GET", "/openapi.json", None, CLIENT),
            ("GET", "/healthz", None, ""),
            ("GET", "/readyz", None, ""),
            ("GET", "/", None, ""),
            ("GET", "/nothing", None, ADMIN),
        ]
        for method, path, body, key in requests:
            here, there = (
                client.request(method, base + path, json=body, headers=bearer(key)) for base in (url, served.url)
            )
            assert comparable(there) == comparable(here), (method, path)
            for name in ("content-security-policy", "x-sailguard-action", "www-authenticate", "cache-control"):
                assert there.headers.get(name) == here.headers.get(name), (path, name)
            assert there.headers["x-request-id"].startswith("req_")  # behind it stands one of Serve's


def test_a_stream_of_events_passes_and_ends_with_its_client(served: Served) -> None:
    timeout = httpx.Timeout(PATIENCE, read=10.0)  # less than from ping to ping
    with httpx.stream("GET", f"{served.url}/v1/events", headers=bearer(ADMIN), timeout=timeout) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        for _ in range(64):  # of each two verdicts one is given by the replica that the stream reached
            assert served.post("/v1/moderations", {"input": "a small bird"}).json()["results"][0]["flagged"]
        line = next(line for line in lines if line.startswith("data: "))
        assert '"domain":"violence"' in line
        assert sum(served.series("sailguard_requests_in_flight").values()) == 1
    wait_for(lambda: sum(served.series("sailguard_requests_in_flight").values()) == 0)


def test_each_replica_shows_itself_on_every_page_of_metrics_and_audits_into_its_own_file(served: Served) -> None:
    for _ in range(32):
        served.post("/v1/moderations", {"input": "a small bird"})
    judged = served.series("sailguard_requests_total", phase="prompt", result="flag")
    assert len(judged) == 2
    assert min(judged.values()) > 0
    stats = served.get("/v1/stats", READER).json()
    assert stats["requests"]["prompt"]["flag"] == sum(judged.values())
    files = sorted(path.name for path in (served.store.parent / "audit").glob("*.sqlite"))
    assert files == ["audit.0.sqlite", "audit.1.sqlite"]
    written = served.series("sailguard_audit_entries_total")
    assert sum(written.values()) >= sum(judged.values())


def test_a_promotion_reaches_every_replica_and_a_bad_bank_none_and_no_request_is_dropped(served: Served) -> None:
    first, second = versions(served)
    store = VersionStore(served.store)
    assert all_use(served, first)
    with Hammer(served.url) as hammer:
        store.promote(served.banks[1])
        wait_for(lambda: all_use(served, second))
        since = len(hammer.banks)
        wait_for(lambda: len(hammer.banks) > since + 12)
        assert set(hammer.banks[since + 3 :]) == {second}  # but for the answers that were under way
        assert set(hammer.banks) == {first, second}
        assert not any(served.series("sailguard_version_behind").values())

        refused = served.series("sailguard_reloads_total", what="bank", result="refused")
        store.promote(served.banks[2])
        wait_for(
            lambda: (
                served.series("sailguard_reloads_total", what="bank", result="refused")
                == {replica: count + 1 for replica, count in refused.items()}
            )
        )
        assert list(served.series("sailguard_version_behind", what="bank").values()) == [1.0, 1.0]
        assert all_use(served, second)

        answer = served.post("/admin/bank/rollback", {"to": "1.0"})  # by way of one replica
        assert answer.status_code == 200, answer.text
        wait_for(lambda: all_use(served, first))
        wait_for(lambda: not any(served.series("sailguard_version_behind").values()))
        since = len(hammer.banks)
        wait_for(lambda: len(hammer.banks) > since + 12)
    assert hammer.problems == []
    assert set(hammer.statuses) == {200}
    assert set(hammer.banks) == {first, second}
    assert set(hammer.banks[since + 3 :]) == {first}


def test_a_process_that_is_killed_costs_its_own_requests_at_most_and_another_one_takes_its_place(
    served: Served,
) -> None:
    before = served.banks_in_use()
    with Hammer(served.url) as hammer:
        os.kill(process_of_a_replica(), signal.SIGKILL)
        wait_for(lambda: len(served.banks_in_use()) == 2 and served.banks_in_use().keys() != before.keys())
        since = len(hammer.statuses)
        wait_for(lambda: len(hammer.statuses) > since + 12)
    assert set(hammer.statuses) <= {200, 500, 503}
    assert len(hammer.problems) == len(hammer.statuses) - hammer.statuses.count(200) <= 6  # no connection broke
    assert set(hammer.statuses[since:]) == {200}
    files = sorted(path.name for path in (served.store.parent / "audit").glob("*.sqlite"))
    assert files == ["audit.0.sqlite", "audit.1.sqlite"]  # it goes on with the file of the dead one


def test_an_update_of_the_application_drops_no_request_and_one_that_fails_leaves_the_old_one(
    served: Served, tmp_path: Path
) -> None:
    from ray import serve

    from service.cluster.application import make_application

    before = served.banks_in_use()

    def update(**changed: Any) -> None:
        settings = served.settings.model_copy(update=changed)
        serve.run(make_application(settings, replicas=2), name="sailguard", route_prefix="/")

    with Hammer(served.url) as hammer:
        update(max_body_bytes=4096)
        assert served.post("/v1/moderations", {"input": "x" * 5000}).status_code == 413
        assert not served.banks_in_use().keys() & before.keys()
        (tmp_path / "policy.yaml").write_text("rules: 1")
        with pytest.raises(RuntimeError):
            update(policy=tmp_path / "policy.yaml")
        since = len(hammer.statuses)
        wait_for(lambda: len(hammer.statuses) > since + 12)
    assert hammer.problems == []
    assert set(hammer.statuses) == {200}


def test_replicas_are_added_while_requests_wait(served: Served) -> None:
    from ray import serve

    from service.cluster.application import make_application

    application = make_application(served.settings, replicas=1, max_replicas=2)
    serve.run(application, name="sailguard", route_prefix="/")
    wait_for(lambda: len(served.banks_in_use()) == 1)
    with Hammer(served.url, clients=24) as hammer:
        wait_for(lambda: len(served.banks_in_use()) == 2)
    assert hammer.problems == []
    assert set(hammer.statuses) == {200}


def test_a_machine_that_is_lost_costs_its_own_requests_and_one_that_comes_gets_a_replica(served: Served) -> None:
    from ray import serve

    from service.cluster.application import make_application

    nodes = served.nodes
    assert nodes is not None
    serve.run(make_application(served.settings, replicas=2), name="sailguard", route_prefix="/")
    with Hammer(served.url) as hammer:
        nodes.kill_second()
        wait_for(lambda: pages(served) == 1)
        since = len(hammer.statuses)
        wait_for(lambda: len(hammer.statuses) > since + 12)  # the other replica answers alone
        nodes.add_second()
        wait_for(lambda: pages(served) == 2)
    assert set(hammer.statuses) <= {200, 500, 503}
    assert len(hammer.problems) <= 2 * hammer.clients  # what was in hand, and what was asked until the loss was seen
    assert set(hammer.statuses[since + hammer.clients :]) == {200}


def pages(served: Served) -> int:
    """Replicas that are seen by way of one; 0 while it does not answer."""
    with contextlib.suppress(httpx.HTTPError, ValueError):
        return len(served.banks_in_use())
    return 0


def process_of_a_replica() -> int:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    details = client.get_serve_details()
    replicas = details["applications"]["sailguard"]["deployments"]["Sailguard"]["replicas"]
    return int(replicas[0]["pid"])

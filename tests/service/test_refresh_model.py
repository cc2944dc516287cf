"""The whole loop with the embedded model: judged, marked, refreshed, tried in the shadow, promoted, judged again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient

from benchmarks.refreshing import TEXTS, mark_all
from feature_bank.bank import shipped_bank_path
from feature_bank.versions import VersionStore
from guard.models import LoadedModel
from service.app import create_app
from service.engine import TransformersEngine
from service.settings import Settings
from training.refresh import refresh_bank

KEY = "an-admin-key-for-tests"
PATIENCE = 60.0


@contextmanager
def serving(**settings: Any) -> Iterator[TestClient]:
    given = Settings(api_keys="a-client-key-for-tests", admin_keys=KEY, watch_seconds=0, **settings)
    app = create_app(
        lambda metrics: TransformersEngine.start(given, metrics),
        given,
        logger=structlog.wrap_logger(structlog.testing.CapturingLogger()),
    )
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def until(met: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def flagged(client: TestClient) -> int:
    """How many of the texts flag politics."""
    reply = client.post("/v1/moderations", json={"input": TEXTS, "role": "passage"})
    assert reply.status_code == 200, reply.text
    return sum(result["sailguard"]["politics"]["flagged"] for result in reply.json()["results"])


@pytest.mark.slow
def test_marked_texts_no_longer_flag_and_quality_stays(embedded: LoadedModel, tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "store")
    first = store.promote(shipped_bank_path()).version
    spool = tmp_path / "spool.db"
    with serving(bank=store.folder, spool=spool, spool_share=0.0) as client:
        assert flagged(client) == len(TEXTS) == 50
    assert mark_all(spool) == 50

    found = refresh_bank(
        store.folder,
        spool=spool,
        model=embedded.model,
        tokenizer=embedded.tokenizer,
        out=tmp_path / "out",
        report=lambda *_: None,
    )
    assert not found.problems  # AUROC and rates of the test split are within the margin
    marks = found.report["fresh"]["politics"]["marks"]["false_positives"]
    assert marks["fit"]["right_before"] == marks["held_out"]["right_before"] == 0
    assert marks["fit"]["right_after"] == marks["fit"]["marked"]
    assert marks["held_out"]["right_after"] >= marks["held_out"]["marked"] - 1

    with serving(bank=store.folder, shadow=found.folder) as client:
        assert flagged(client) == 50  # the candidate has no say
        until(lambda: client.get("/admin/shadow").json()["shadow"]["texts"] == 50)
        shadow = client.get("/admin/shadow").json()["shadow"]
        assert shadow["errors"] == 0
        assert shadow["domains"]["politics"]["only_current"]["count"] >= 49
        assert shadow["domains"]["politics"]["only_candidate"]["count"] == 0

        second = store.promote(found.folder).version
        assert client.post("/admin/bank/reload").json()["bank"] == second
        assert flagged(client) <= 1
        assert client.post("/admin/bank/rollback").json()["bank"] == first
        assert flagged(client) == 50

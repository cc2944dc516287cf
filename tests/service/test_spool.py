"""What the server spools: all that has a verdict, the sample and nothing else, and never at a request's expense."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from fastapi.testclient import TestClient

from feature_bank.spool import Spool, SpoolError, SpoolItem
from feature_bank.spool_retention import prune
from guard.events import Verdict
from guard.metrics import Metrics
from service import failures, spool_writer
from service.errors import SettingsError
from service.settings import Settings
from service.spool import Kept, NoSpool, open_spool
from service.spool_writer import SpoolWriter
from tests.feature_bank.test_spool import item

PATIENCE = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def start(make_app: Callable[..., Any], path: Path) -> Iterator[Callable[..., TestClient]]:
    """Start an application; it has written all that it keeps when it is closed."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> TestClient:
            app = make_app(**{"spool": path, "spool_share": 0.0, **settings})
            return stack.enter_context(TestClient(app))

        yield make


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def stored(path: Path, count: int) -> list[SpoolItem]:
    """The items of the file once there are `count`."""

    def found() -> list[SpoolItem]:
        with Spool.open_for_reading(path) as spool:
            return list(spool.items())

    until(lambda: len(found()) >= count)
    return found()


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(name, labels)
    assert value is not None
    return value


# ---- what is kept --------------------------------------------------------------------------------------------


def test_texts_with_a_verdict_are_kept_as_the_guard_saw_them_and_no_others(
    start: Callable[..., TestClient], path: Path, engine: Any, metrics: Metrics
) -> None:
    client = start()
    texts = ["a heron", "some violence there", "a reed", "terror and politics"]
    request_id = client.post("/v1/moderations", json={"input": texts}).headers["X-Request-Id"]
    one, other = stored(path, 2)
    assert [(item.choice, item.flagged) for item in (one, other)] == [(1, ("violence",)), (3, ("politics", "terror"))]
    assert one.request_id == other.request_id == request_id
    assert (one.endpoint, one.phase, one.streamed, one.why, one.action) == (
        "moderations",
        "prompt",
        False,
        "verdict",
        "block",
    )
    assert (one.content_hash, one.bank, one.policy) == (engine.bank.content_hash, "bank-1", "policy-1")
    assert one.scores["violence"] == 0.99
    assert set(one.scores) == set(engine.bank.heads)
    assert one.text is None
    found = one.activations()
    np.testing.assert_array_equal(found.acts, engine.acts(3).astype(np.float16).astype(np.float32))
    until(lambda: counted(metrics, "sailguard_spool_items_total", why="verdict") == 2)


def test_texts_are_kept_with_consent_only(start: Callable[..., TestClient], path: Path) -> None:
    client = start(spool_text=True)
    client.post("/v1/moderations", json={"input": "some violence there"})
    assert [item.text for item in stored(path, 1)] == ["some violence there"]


@pytest.mark.parametrize("url", ["/v1/moderations", "/v1/traces", "/v1/playground"])
def test_a_sampled_text_is_kept_without_a_verdict(start: Callable[..., TestClient], path: Path, url: str) -> None:
    client = start(spool_share=1.0)
    assert client.post(url, json={"input": "a heron stands", "role": "response"}).status_code == 200
    (item,) = stored(path, 1)
    assert (item.why, item.action, item.flagged, item.phase, item.tokens) == ("sampled", "allow", (), "response", 3)


def test_answers_are_kept_with_their_prompts(start: Callable[..., TestClient], path: Path, engine: Any) -> None:
    client = start(spool_share=1.0, spool_text=True)
    body = {"model": "sailguard", "messages": [{"role": "user", "content": "a heron stands"}], "n": 2}
    client.post("/v1/chat/completions", json=body)
    items = stored(path, 3)
    assert sorted((item.phase, item.choice, item.streamed) for item in items) == [
        ("prompt", items[0].choice, False),
        ("response", 0, True),
        ("response", 1, True),
    ]
    assert {item.phase: item.text for item in items} == {"prompt": "a heron stands", "response": "a heron stands "}
    assert {item.tokens for item in items} == {3}
    assert {item.why for item in items} == {"sampled"}


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_blocked_answer_all_is_kept_that_was_judged(
    start: Callable[..., TestClient], path: Path, stream: bool
) -> None:
    client = start()
    body = {"model": "sailguard", "messages": [{"role": "user", "content": "one two BLOCK more"}], "stream": stream}
    client.post("/v1/chat/completions", json=body)
    (item,) = stored(path, 1)
    assert (item.phase, item.action, item.flagged, item.why) == ("response", "block", ("violence",), "verdict")
    assert item.tokens == 3  # the token that decided among them
    assert item.scores["violence"] == 0.97


def test_a_steered_run_of_the_playground_is_not_kept(start: Callable[..., TestClient], path: Path) -> None:
    client = start(spool_share=1.0)
    chat = {"messages": [{"role": "user", "content": "a heron"}]}
    client.post("/v1/playground", json={**chat, "compare": True, "steer": ["violence=1"]})
    items = stored(path, 2)
    assert [(item.phase, item.choice) for item in items] == [("prompt", 0), ("response", 0)]
    assert items[0].endpoint == "playground"


def test_without_a_spool_the_engine_is_asked_for_nothing(make_app: Callable[..., Any], engine: Any) -> None:
    engine.score = lambda texts, roles: [engine._score(text) for text in texts]
    with TestClient(make_app()) as client:
        assert client.post("/v1/moderations", json={"input": "some violence"}).status_code == 200


def test_the_sample_is_by_the_id_alone_and_of_its_size(path: Path, metrics: Metrics) -> None:
    spools = [open_spool(Settings(spool=path, spool_share=share), metrics, None) for share in (0.0, 0.1, 0.1, 1.0)]
    try:
        chosen = [[spool.samples(f"req_{n}") for n in range(3000)] for spool in spools]
    finally:
        for spool in spools:
            spool.close()
    assert sum(chosen[0]) == 0
    assert chosen[1] == chosen[2]
    assert 200 < sum(chosen[1]) < 400
    assert all(chosen[3])


def test_texts_are_not_kept_for_ever(path: Path, metrics: Metrics) -> None:
    with pytest.raises(SpoolError, match="SAILGUARD_SPOOL_DAYS"):
        open_spool(Settings(spool=path, spool_text=True, spool_days=0), metrics, None)
    assert isinstance(open_spool(Settings(), metrics, None), NoSpool)
    with pytest.raises(SettingsError, match="spool_share"):
        Settings(spool_share=1.5)


def test_texts_from_before_are_not_kept_for_ever_either(path: Path, metrics: Metrics) -> None:
    unlimited = Settings(spool=path, spool_days=0)
    open_spool(unlimited, metrics, None).close()  # a file without texts
    with Spool.open_for_writing(path) as spool:
        spool.add([item("old", text="a heron", unix=1000.0), item("other", unix=1000.0)])
    with pytest.raises(SpoolError, match=r"holds texts.*SAILGUARD_SPOOL_DAYS.*spool prune --days 1") as caught:
        open_spool(unlimited, metrics, None)
    assert str(path) in str(caught.value)
    assert [one.request_id for one in stored(path, 2)] == ["old", "other"]
    open_spool(Settings(spool=path), metrics, None).close()  # 90 days: the texts have an end
    with Spool.open_existing(path) as spool:
        prune(spool, before=time.time() - 86400.0)  # as the message says
    open_spool(unlimited, metrics, None).close()


# ---- the writer ----------------------------------------------------------------------------------------------


def kept(engine: Any, number: int = 0, tokens: int = 3, **changes: Any) -> Kept:
    given: dict[str, Any] = {
        "engine": engine,
        "request_id": f"req_{number}",
        "endpoint": "chat",
        "choice": 0,
        "phase": "prompt",
        "streamed": False,
        "verdicts": (),
        "scores": {},
        "sampled": True,
        "seen": engine._seen(" ".join("x" * tokens)),
        "text": None,
    }
    return Kept(**{**given, **changes})


@pytest.fixture
def writer(path: Path, metrics: Metrics) -> Iterator[Callable[..., SpoolWriter]]:
    with contextlib.ExitStack() as stack:

        def make(**changes: Any) -> SpoolWriter:
            given = {"text": False, "days": 0, "most": 0, "metrics": metrics, **changes}
            made = SpoolWriter(path, **given)
            stack.callback(made.close)
            return made

        yield make


def test_what_was_handed_over_before_the_end_is_on_the_disk(
    writer: Callable[..., SpoolWriter], engine: Any, path: Path
) -> None:
    spool = writer()
    for number in range(200):
        spool.submit(kept(engine, number))
    spool.close()
    assert [item.request_id for item in stored(path, 200)] == [f"req_{number}" for number in range(200)]


def test_what_finds_no_room_is_dropped_and_counted_at_once(
    writer: Callable[..., SpoolWriter], engine: Any, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    go, busy = threading.Event(), threading.Event()
    add = Spool.add

    def slow(self: Spool, items: Any) -> int:
        busy.set()
        assert go.wait(PATIENCE)
        return add(self, items)

    monkeypatch.setattr(Spool, "add", slow)
    monkeypatch.setattr(spool_writer, "_MAX_WAITING", 5)
    spool = writer()
    spool.submit(kept(engine, 0))
    assert busy.wait(PATIENCE)
    began = time.monotonic()
    for number in range(1, 11):
        spool.submit(kept(engine, number))
    assert time.monotonic() - began < 1.0
    assert counted(metrics, "sailguard_spool_dropped_total", reason="full") == 5
    go.set()
    spool.close()
    assert [item.request_id for item in stored(path, 6)] == [f"req_{number}" for number in range(6)]


def test_a_disk_that_fails_costs_items_and_no_request(
    start: Callable[..., TestClient], path: Path, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Spool, items: Any) -> int:
        raise SpoolError("disk full")

    client = start()
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "add", fail)
        for _ in range(3):
            assert client.post("/v1/moderations", json={"input": "some violence"}).status_code == 200
        until(lambda: counted(metrics, "sailguard_spool_dropped_total", reason="error") == 3)
    client.post("/v1/moderations", json={"input": "violence again"})
    assert len(stored(path, 1)) == 1


def test_one_bad_item_is_not_the_others_fault(
    writer: Callable[..., SpoolWriter], engine: Any, metrics: Metrics, path: Path
) -> None:
    def fails() -> None:
        raise RuntimeError("a secret text")

    spool = writer()
    spool.submit(kept(engine, 0))
    spool.submit(kept(engine, 1, seen=fails))
    spool.submit(kept(engine, 2, seen=lambda: None))  # of which nothing was judged
    spool.submit(kept(engine, 3))
    spool.close()
    assert [item.request_id for item in stored(path, 2)] == ["req_0", "req_3"]
    assert counted(metrics, "sailguard_spool_dropped_total", reason="error") == 1


def test_of_a_long_text_the_part_is_kept_in_which_it_was_decided(
    writer: Callable[..., SpoolWriter], engine: Any, path: Path
) -> None:
    verdict: Verdict = engine.verdict()
    late = dataclasses.replace(verdict, phase="prompt", token_index=1500)
    spool = writer()
    long = kept(engine, 0, tokens=2000)
    spool.submit(long)
    spool.submit(dataclasses.replace(long, verdicts=(late,)))
    spool.close()
    first, decided = stored(path, 2)
    assert isinstance(long.seen, tuple)
    exact = long.seen.acts.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(first.activations().acts, exact[:1024])
    np.testing.assert_array_equal(decided.activations().acts, exact[1501 - 1024 : 1501])


def test_a_file_that_was_taken_away_is_not_written_to(
    writer: Callable[..., SpoolWriter], engine: Any, metrics: Metrics, path: Path
) -> None:
    spool = writer()
    path.rename(path.with_name("elsewhere.db"))
    spool.submit(kept(engine))
    spool.close()
    assert counted(metrics, "sailguard_spool_dropped_total", reason="error") == 1
    assert not path.exists()


def test_where_a_file_was_taken_away_nothing_is_made_and_it_is_whole_once_it_is_back(
    writer: Callable[..., SpoolWriter], engine: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_OLD_SECONDS", "_SIZE_SECONDS"):
        monkeypatch.setattr(spool_writer, name, 0.01)
    monkeypatch.setattr(failures, "_LOG_SECONDS", 0.0)
    log = structlog.testing.CapturingLogger()
    spool = writer(days=1, most=2**30, logger=structlog.wrap_logger(log, processors=[]))
    spool.submit(kept(engine, 0))
    stored(path, 1)
    elsewhere = path.with_name("elsewhere.db")
    path.rename(elsewhere)
    spool.submit(kept(engine, 1))
    before = len(log.calls)
    until(lambda: len(log.calls) >= before + 5)  # it was refused, and removal was tried a few times
    assert {call.kwargs["reason"] for call in log.calls} == {log.calls[0].kwargs["reason"]}
    assert "put it back" in log.calls[0].kwargs["reason"]
    assert not path.exists()
    elsewhere.rename(path)
    spool.submit(kept(engine, 2))
    spool.close()
    assert [one.request_id for one in stored(path, 2)] == ["req_0", "req_2"]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# ---- what is removed -----------------------------------------------------------------------------------------


def test_old_items_go_with_their_marks(writer: Callable[..., SpoolWriter], engine: Any, path: Path) -> None:
    first = writer()
    for age in (3.0, 1.0):
        first.submit(kept(engine, int(age), unix=time.time() - age * 86400))
    first.close()
    with Spool.open_for_writing(path) as spool:
        spool.mark(1, "violence", "miss", reviewer="ann")
    writer(days=2)
    until(lambda: [item.request_id for item in stored(path, 0)] == ["req_1"])
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM marks").fetchone() == (0,)


def test_what_is_too_much_goes_sampled_items_first_and_marked_ones_never(
    writer: Callable[..., SpoolWriter], engine: Any, path: Path
) -> None:
    first = writer()
    for number in range(150):
        first.submit(kept(engine, number, tokens=40, sampled=number % 3 != 0))
    first.close()
    with Spool.open_for_writing(path) as spool:
        spool.mark(1, "violence", "miss", reviewer="ann")
        spool.mark(2, "violence", "miss", reviewer="ann")
    full = path.stat().st_size
    writer(most=full // 2).close()
    with Spool.open_for_reading(path) as spool:
        left = [(item.id, item.why) for item in spool.items()]
    assert (1, "verdict") in left
    assert (2, "sampled") in left
    assert len([1 for _, why in left if why == "verdict"]) == 50
    assert len(left) < 150
    writer(most=1).close()
    with Spool.open_for_reading(path) as spool:
        assert [item.id for item in spool.items()] == [1, 2]
    assert path.stat().st_size < full / 4

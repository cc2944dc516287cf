"""The shadow: it counts what a candidate decides differently, and an answer is the same with it, without it and when
it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog

from feature_bank.bank import Bank, save_bank
from feature_bank.errors import BankError
from feature_bank.schema import Heads
from feature_bank.spool_acts import Acts
from guard.metrics import Metrics
from service.shadow import Shadow, ShadowedSpool, check_same_rows
from service.spool import Kept, NoSpool
from tests.factories import make_bank, make_policy

PATIENCE = 20.0
POLICY = make_policy({"domain": "politics", "scope": ["prompt", "response"], "action": "flag"})


@pytest.fixture
def banks(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> tuple[Bank, Bank]:
    """One that flags politics in everything, and one with the same rows that flags it in nothing."""
    current = make_bank(tmp_path / "current", tiny_model, tiny_tokenizer, fires={"politics": True})
    return current, with_intercept(current, tmp_path / "candidate", -40.0)


def with_intercept(bank: Bank, folder: Path, intercept: float) -> Bank:
    heads = dict(bank.heads)
    calibration = heads["politics"].calibration.model_copy(update={"intercept": intercept})
    heads["politics"] = heads["politics"].model_copy(update={"calibration": calibration})
    manifest = bank.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    return save_bank(
        folder,
        manifest={**manifest, "version": "2"},
        features=bank.features,
        heads=Heads.model_validate({"pooling": bank.pooling, "heads": heads}),
        rows=bank.rows,
    )


def kept(
    bank: Bank, *, flagged: bool, streamed: bool = False, tokens: int = 20, seen: Callable[[], None] | None = None
) -> Kept:
    engine: Any = SimpleNamespace(bank=bank, policy=POLICY, bank_version=bank.version)
    verdict: Any = SimpleNamespace(domain="politics", action="flag", token_index=0)
    return Kept(
        engine=engine,
        request_id="r1",
        endpoint="moderations",
        choice=0,
        phase="response" if streamed else "prompt",
        streamed=streamed,
        verdicts=[verdict] if flagged else [],
        scores={"politics": 1.0 if flagged else 0.0},
        sampled=True,
        seen=seen
        or Acts(np.zeros(tokens, dtype=np.int64), np.full((tokens, len(bank.features)), 0.5, dtype=np.float32)),
        text="never shown",
    )


class InUse:
    """The bank in use."""

    def __init__(self) -> None:
        self.bank: Bank | None = None

    def __call__(self) -> Bank | None:
        return self.bank


@pytest.fixture
def in_use(banks: tuple[Bank, Bank]) -> InUse:
    found = InUse()
    found.bank = banks[0]
    return found


def watched(in_use: InUse) -> tuple[Shadow, Any]:
    """A shadow, and what it logs; who asks for it closes it."""
    log = structlog.testing.CapturingLogger()
    return Shadow(Metrics(), structlog.wrap_logger(log, processors=[]), in_use=in_use), log


@pytest.fixture
def shadow(in_use: InUse) -> Any:
    made = Shadow(Metrics(), structlog.wrap_logger(structlog.testing.CapturingLogger()), in_use=in_use)
    yield made
    made.close()


def wait(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def counted(shadow: Shadow, name: str) -> int:
    return int(getattr(shadow.status(), name))


@pytest.mark.parametrize("streamed", [False, True])
def test_counts_rates_and_the_latest_disagreements_are_right(
    shadow: Shadow, banks: tuple[Bank, Bank], streamed: bool
) -> None:
    current, candidate = banks
    shadow.start(candidate)
    for flagged in (True, True, True, False):
        shadow.offer(kept(current, flagged=flagged, streamed=streamed))
    wait(lambda: counted(shadow, "texts") == 4)
    status = shadow.status()
    assert status is not None
    assert status.domains["politics"].only_current.count == 3
    assert status.domains["politics"].only_current.rate == 0.75
    assert status.domains["politics"].only_candidate.count == 0
    assert status.domains["violence"].only_current.count == 0
    assert [(one.domain, one.kind, one.request_id) for one in status.latest] == [("politics", "only_current", "r1")] * 3
    assert "never shown" not in status.model_dump_json()


def test_a_candidate_that_flags_more_is_told_apart(
    shadow: Shadow, in_use: InUse, banks: tuple[Bank, Bank], tmp_path: Path
) -> None:
    current = in_use.bank = banks[1]
    shadow.start(with_intercept(current, tmp_path / "more", 40.0))
    shadow.offer(kept(current, flagged=False))
    shadow.offer(kept(current, flagged=False, streamed=True))
    wait(lambda: counted(shadow, "texts") == 2)
    status = shadow.status()
    assert status is not None
    assert status.domains["politics"].only_candidate.count == 2


def test_the_same_bank_never_disagrees_with_itself_and_the_metrics_count(
    banks: tuple[Bank, Bank], in_use: InUse
) -> None:
    metrics = Metrics()
    shadow = Shadow(metrics, structlog.wrap_logger(structlog.testing.CapturingLogger()), in_use=in_use)
    shadow.start(banks[0])
    shadow.offer(kept(banks[0], flagged=True))
    shadow.offer(kept(banks[0], flagged=False))  # the policy flags everything: this one disagrees
    wait(lambda: counted(shadow, "texts") == 2)
    shadow.close()
    page = metrics.render().decode()
    assert 'sailguard_shadow_texts_total{result="judged"} 2.0' in page
    assert 'sailguard_shadow_disagreements_total{domain="politics",kind="only_candidate"} 1.0' in page


def test_an_error_is_counted_and_the_shadow_goes_on(
    shadow: Shadow, banks: tuple[Bank, Bank], monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow.start(banks[1])
    with monkeypatch.context() as patched:
        patched.setattr("service.shadow.StreamJudge", lambda *_: 1 / 0)
        shadow.offer(kept(banks[0], flagged=True))
        wait(lambda: counted(shadow, "errors") == 1)
    shadow.offer(kept(banks[0], flagged=True))
    wait(lambda: counted(shadow, "texts") == 1)


def test_failures_are_logged_seldom_and_without_what_others_say_in_them(
    banks: tuple[Bank, Bank], in_use: InUse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("never shown")

    monkeypatch.setattr("service.shadow.StreamJudge", fail)
    shadow, log = watched(in_use)
    shadow.start(banks[1])
    for _ in range(5):
        shadow.offer(kept(banks[0], flagged=True))
    wait(lambda: counted(shadow, "errors") == 5)
    shadow.close()
    (call,) = log.calls
    assert call.kwargs["reason"] == "ValueError"
    assert call.kwargs["candidate"] == banks[1].version


def test_counts_are_of_one_current_bank_and_begin_anew_with_another(
    shadow: Shadow, in_use: InUse, banks: tuple[Bank, Bank], tmp_path: Path
) -> None:
    current, candidate = banks
    following = with_intercept(current, tmp_path / "following", 40.0)
    assert following.content_hash != current.content_hash
    shadow.start(candidate)
    for _ in range(3):
        shadow.offer(kept(current, flagged=True))
    shadow.offer(kept(current, flagged=True, tokens=1024))
    wait(lambda: counted(shadow, "texts") == 3 and counted(shadow, "skipped") == 1)
    status = shadow.status()
    assert status is not None
    assert status.beside == current.version
    in_use.bank = following
    shadow.offer(kept(current, flagged=True))  # began before
    wait(lambda: counted(shadow, "skipped") == 2)
    assert counted(shadow, "texts") == 3
    shadow.offer(kept(following, flagged=False))
    wait(lambda: counted(shadow, "texts") == 1)
    shadow.offer(kept(current, flagged=True))
    wait(lambda: counted(shadow, "skipped") == 1)
    status = shadow.status()
    assert status is not None
    assert status.beside == following.version
    assert (status.texts, status.errors, status.latest, status.stopped) == (1, 0, [], None)
    assert status.domains["politics"].only_current.count == 0


def test_a_current_bank_with_other_features_stops_the_shadow_once_and_says_why(
    banks: tuple[Bank, Bank], in_use: InUse, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    current, candidate = banks
    other = make_bank(tmp_path / "other", tiny_model, tiny_tokenizer, seed=3)
    shadow, log = watched(in_use)
    shadow.start(candidate)
    shadow.offer(kept(current, flagged=True))
    wait(lambda: counted(shadow, "texts") == 1)
    shadow.offer(kept(other, flagged=True))  # of a bank that was replaced: it stops nothing
    wait(lambda: counted(shadow, "skipped") == 1)
    go, begun = threading.Event(), threading.Event()
    shadow.offer(kept(current, flagged=True, seen=lambda: begun.set() or (go.wait(PATIENCE) and None)))
    assert begun.wait(PATIENCE)
    in_use.bank = other
    for _ in range(5):  # which wait when the first of them stops it
        shadow.offer(kept(other, flagged=True))
    go.set()
    wait(lambda: counted(shadow, "skipped") == 7)
    status = shadow.status()
    assert status is not None
    assert status.stopped is not None
    assert "the encoder rows" in status.stopped
    assert other.version in status.stopped
    assert (status.candidate, status.beside, status.texts, status.errors) == (candidate.version, current.version, 1, 0)
    assert not shadow.on
    shadow.offer(kept(current, flagged=True))
    assert [(call.kwargs["candidate"], call.kwargs["reason"]) for call in log.calls] == [
        (candidate.version, status.stopped)
    ]
    in_use.bank = current
    shadow.start(candidate)
    assert shadow.on
    shadow.offer(kept(current, flagged=True))
    wait(lambda: counted(shadow, "texts") == 1)
    assert getattr(shadow.status(), "stopped", "") is None
    shadow.stop()
    assert shadow.status() is None
    shadow.close()


def test_texts_of_which_a_part_was_cut_off_do_not_count(shadow: Shadow, banks: tuple[Bank, Bank]) -> None:
    shadow.start(banks[1])
    shadow.offer(kept(banks[0], flagged=True, tokens=1024))
    wait(lambda: counted(shadow, "skipped") == 1)


def test_a_candidate_with_other_rows_is_refused(
    banks: tuple[Bank, Bank], tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    other = make_bank(tmp_path / "other", tiny_model, tiny_tokenizer, seed=3)
    check_same_rows(*banks)
    with pytest.raises(BankError, match="the encoder rows"):
        check_same_rows(banks[0], other)


def test_the_spool_behind_it_gets_what_it_would_get_without_it(shadow: Shadow, banks: tuple[Bank, Bank]) -> None:
    class Asked(NoSpool):
        on = True

        def __init__(self) -> None:
            self.offered: list[Kept] = []

        def samples(self, request_id: str) -> bool:
            return request_id == "wanted"

        def offer(self, kept: Kept) -> None:
            self.offered.append(kept)

    asked = Asked()
    spool = ShadowedSpool(asked, shadow)
    assert not spool.samples("other")
    shadow.start(banks[1])
    assert spool.samples("other")
    spool.offer(kept(banks[0], flagged=False))
    assert asked.offered == []
    spool.offer(kept(banks[0], flagged=True))
    assert [one.sampled for one in asked.offered] == [False]


def test_without_a_shadow_and_a_spool_nothing_is_asked_for(shadow: Shadow) -> None:
    spool = ShadowedSpool(NoSpool(), shadow)
    assert not spool.on
    assert not spool.samples("any")

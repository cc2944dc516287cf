"""Shadow mode: a candidate bank judges the live traffic beside the current one, and never acts.

It stands before the spool and is given what that is given: the activations by which a text or an answer was judged. A
candidate with the same rows, such as `train refresh` makes, needs no forward pass of its own, only its heads. All of it
happens on a thread of its own, after the answer: an error there is counted and logged, and nothing else.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.bank import WEIGHTS, Bank
from feature_bank.errors import BankError
from feature_bank.spool import MAX_TOKENS
from guard.stream_judge import StreamJudge
from service.failures import FailureLog
from service.schemas_shadow import ShadowCount, ShadowDisagreement, ShadowStatus, rate_of

if TYPE_CHECKING:
    from feature_bank.spool_acts import Acts
    from guard.metrics import Metrics
    from service.spool import Kept, Spooling

__all__ = ["Shadow", "ShadowedSpool", "check_same_rows"]

LATEST = 100
_WAITING = 256  # judged texts that wait for the shadow; one more is left out, and counted
_END_SECONDS = 5.0


def check_same_rows(current: Bank, candidate: Bank) -> None:
    """Raise BankError unless what the current bank's features give is what the candidate's would."""
    same = {
        "the model": current.manifest.model == candidate.manifest.model,
        "the hook points": current.hook_names == candidate.hook_names,
        "the encoder rows": current.manifest.files[WEIGHTS] == candidate.manifest.files[WEIGHTS],
        "the features": [f.id for f in current.features] == [f.id for f in candidate.features],
        "the features' scales": [f.scale for f in current.features] == [f.scale for f in candidate.features],
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise BankError(
            f"{candidate.version} cannot be a shadow of {current.version}, for {' and '.join(other)} differ: a shadow "
            "judges by the activations that were read anyway, so it is a version with the same features, such as "
            "`sailguard train refresh` makes"
        )


class _Run:
    """One candidate, and what has been counted of it. Its counts belong to the shadow's lock."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.beside: str | None = None
        """The version of the bank whose decisions are compared with the candidate's."""
        self.stopped: str | None = None
        """Why the candidate judges no more."""
        self._hash = ""
        self.texts = self.errors = self.skipped = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.latest: deque[ShadowDisagreement] = deque(maxlen=LATEST)
        self._judges: dict[str, StreamJudge] = {}

    def counts_beside(self, current: Bank) -> bool:
        """Whether what is counted is counted beside this bank."""
        return self._hash == current.content_hash

    def begin(self, current: Bank) -> None:
        """Count beside this bank from now on: what was counted beside another one says nothing of it."""
        self.texts = self.errors = self.skipped = 0
        self.counts.clear()
        self.latest.clear()
        self.beside, self._hash = current.version, current.content_hash

    def flagged(self, kept: Kept, acts: Acts) -> frozenset[str]:
        """The domains in which the candidate flags what was judged, under the same policy."""
        if kept.policy.version not in self._judges:
            self._judges = {kept.policy.version: StreamJudge(self.bank, kept.policy)}
        judge = self._judges[kept.policy.version]
        state = judge.begin([""])
        if kept.streamed:
            for token in range(len(acts.acts)):
                judge.observe_step(state, acts.acts[token : token + 1])
                if state.blocked[0]:
                    break
            judge.finish(state)
            verdicts = state.verdicts[0]
        else:
            judged = judge.judge(acts.acts, acts.segments)
            places = acts.segments * 0
            verdicts = judge.apply_rules(kept.phase, "", judged, acts.acts, acts.segments, places)
        return frozenset(v.domain for v in verdicts if v.action != "allow" and v.domain in self.bank.heads)


class Shadow:
    """The candidate, if there is one. All methods may be called from any thread."""

    def __init__(self, metrics: Metrics, logger: Any, *, in_use: Callable[[], Bank | None]) -> None:
        self._metrics = metrics
        self._in_use = in_use
        self._logger = logger
        self._failures = FailureLog(logger, "the shadow failed on a text")
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._queue: queue.Queue[tuple[_Run, Kept] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether there is a candidate that judges."""
        return self._judging() is not None

    def start(self, bank: Bank) -> None:
        """Judge by this candidate from now on; what was counted of another is forgotten."""
        with self._lock:
            self._run = _Run(bank)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="sailguard-shadow", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Judge by no candidate."""
        with self._lock:
            self._run = None

    def offer(self, kept: Kept) -> None:
        """Have it judged by the candidate, if there is room. Returns at once and never fails."""
        run = self._judging()
        if run is None:
            return
        try:
            self._queue.put_nowait((run, kept))
        except queue.Full:
            self._count(run, "skipped")

    def close(self) -> None:
        """Judge what waits, and end."""
        with self._lock:
            self._run, thread, self._thread = None, self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_END_SECONDS)

    def status(self) -> ShadowStatus | None:
        """What has been counted of the candidate; None while there is none."""
        with self._lock:
            run = self._run
            if run is None:
                return None
            domains = {
                domain: ShadowCount(
                    only_current=rate_of(run.counts[domain, "only_current"], run.texts),
                    only_candidate=rate_of(run.counts[domain, "only_candidate"], run.texts),
                )
                for domain in run.bank.heads
            }
            return ShadowStatus(
                candidate=run.bank.version,
                beside=run.beside,
                stopped=run.stopped,
                texts=run.texts,
                errors=run.errors,
                skipped=run.skipped,
                domains=domains,
                latest=list(reversed(run.latest)),
            )

    def _judging(self) -> _Run | None:
        run = self._run
        return None if run is None or run.stopped is not None else run

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            run, kept = work
            try:
                if self._fits(run, kept.bank):
                    self._judge(run, kept)
                else:
                    self._count(run, "skipped")
            except Exception as error:  # noqa: BLE001 - the candidate is on trial, not the answer
                self._count(run, "error")
                self._failures.add(error, candidate=run.bank.version)

    def _fits(self, run: _Run, current: Bank) -> bool:
        """Whether the candidate can judge what this bank has judged.

        Another bank than before begins a new count, and one with other features stops the shadow: it could judge none
        of the texts to come. An answer that began under a bank that was replaced meanwhile does neither.
        """
        in_use = self._in_use()
        if run.stopped is not None or in_use is None or in_use.content_hash != current.content_hash:
            return False
        if run.counts_beside(current):
            return True
        try:
            check_same_rows(current, run.bank)
        except BankError as error:
            with self._lock:
                run.stopped = str(error)
            self._logger.error("shadow stopped", candidate=run.bank.version, reason=run.stopped)
            return False
        with self._lock:
            run.begin(current)
        return True

    def _judge(self, run: _Run, kept: Kept) -> None:
        acts = kept.acts()
        if acts is None or len(acts.segments) >= MAX_TOKENS:  # the rest of what decided may have been cut off
            self._count(run, "skipped")
            return
        current = frozenset(kept.flagged)
        candidate = run.flagged(kept, acts)
        self._count(run, "judged")
        self._failures.over()
        for kind, domains in (("only_current", current - candidate), ("only_candidate", candidate - current)):
            for domain in sorted(domains):
                self._metrics.count_shadow_disagreement(domain, kind)
                found = ShadowDisagreement.of(kept, domain=domain, kind=kind)
                with self._lock:
                    run.counts[domain, kind] += 1
                    run.latest.append(found)

    def _count(self, run: _Run, result: str) -> None:
        self._metrics.count_shadow_text(result)
        with self._lock:
            if result == "judged":
                run.texts += 1
            elif result == "error":
                run.errors += 1
            else:
                run.skipped += 1


class ShadowedSpool:
    """A spool that shows the shadow everything that was judged before it keeps its own share."""

    def __init__(self, spool: Spooling, shadow: Shadow) -> None:
        self._spool = spool
        self._shadow = shadow

    @property
    def on(self) -> bool:
        """Whether anything is kept or judged by a candidate."""
        return self._spool.on or self._shadow.on

    def samples(self, request_id: str) -> bool:
        """Whether what is judged for this request is wanted whatever comes of it: the shadow wants everything."""
        return self._shadow.on or self._spool.samples(request_id)

    def offer(self, kept: Kept) -> None:
        """To the shadow, and to the spool if that would have it without a shadow."""
        self._shadow.offer(kept)
        if self._spool.on:
            sampled = self._spool.samples(kept.request_id)
            if sampled or kept.verdicts:
                self._spool.offer(replace(kept, sampled=sampled))

    def close(self) -> None:
        """Close both."""
        self._shadow.close()
        self._spool.close()


def load_candidate(place: Path, current: Bank) -> Bank:
    """The bank at `place`. Raises BankError if it is damaged or has other features than the current one."""
    candidate = Bank.load(place)
    check_same_rows(current, candidate)
    return candidate

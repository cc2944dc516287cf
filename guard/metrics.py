"""The guard's Prometheus metrics: every metric name of the project stands in this file.

A `Metrics` object owns its registry, so two guards in one process, or two tests, never share a counter.
Units are base units; labels are small enums and never hold user, request or prompt data.

Several processes behind one port show one page: where `PROMETHEUS_MULTIPROC_DIR` names an empty folder before
any of them starts, each keeps its series in files there, and `render` adds them all up. Whoever started a process
takes it out of the gauges when it has ended, with `prometheus_client.multiprocess.mark_process_dead`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess, values

from guard.errors import GuardError

if TYPE_CHECKING:
    from guard.events import Verdict

__all__ = ["CONTENT_TYPE", "FEATURE_CAP", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of `Metrics.render()`: the plain text format, which every Prometheus version reads."""
FEATURE_CAP = 50
"""Most features whose activations are shown; each is a histogram, so a series for every bucket."""

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SCORE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_STEP_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)
_ACTIVATION_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
_BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

_PHASES = ("prompt", "response")
_RESULTS = ("allow", "flag", "steer", "block", "error")
_ON_ERROR = ("block", "flag", "allow")
_REFUSALS = ("queue", "rate", "concurrency", "timeout", "not_ready", "auth", "host", "size")
_SPOOLED = ("sampled", "verdict")
_SPOOL_DROPS = ("full", "error")
_SHADOWED = ("judged", "skipped", "error")
_RELOADED = ("bank", "policy")
_RELOADS = ("ok", "refused")
_BANK_LABELS = ("name", "version", "model", "content_hash")
_POLICY_LABELS = ("name", "version", "on_error")


class Metrics:
    """Counters, histograms and info series of one guard and of the server in front of it.

    `registry` takes the series; without one a fresh registry is made. `features` are the ids of the features whose
    activations are shown: the first `FEATURE_CAP` of them, the others are counted as dropped. All methods may be
    called from any thread. Series whose labels are known beforehand exist from the start with the value 0, so that
    an alert on their rate also sees the first event.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, features: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._requests = Counter(
            "sailguard_requests",
            "Sequences judged, by phase and by the strongest action taken.",
            ["phase", "result"],
            registry=self.registry,
        )
        self._verdicts = Counter("sailguard_verdicts", "Verdicts given.", ["domain", "action"], registry=self.registry)
        self._domain_score = Histogram(
            "sailguard_domain_score",
            "Highest calibrated probability of a domain in a judged sequence.",
            ["domain"],
            buckets=_SCORE_BUCKETS,
            registry=self.registry,
        )
        self._step_overhead = Histogram(
            "sailguard_step_overhead_seconds",
            "Time the guard added to one forward pass.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._pass_seconds = Counter(
            "sailguard_pass_seconds",
            "Time of forward passes in which answers were generated, the guard's own included.",
            registry=self.registry,
        )
        self._tokens_observed = Counter(
            "sailguard_tokens_observed", "Generated tokens that the guard observed.", registry=self.registry
        )
        self._tokens_generated = Counter(
            "sailguard_tokens_generated", "Tokens that the model generated.", registry=self.registry
        )
        self._errors = Counter(
            "sailguard_errors",
            "Internal errors of the guard, by what the policy made of them.",
            ["on_error"],
            registry=self.registry,
        )
        self._bank = _InUse("sailguard_bank_info", "1 for the feature bank in use.", _BANK_LABELS, self.registry)
        self._policy = _InUse("sailguard_policy_info", "1 for the policy in use.", _POLICY_LABELS, self.registry)
        self._behind = _gauge(
            "sailguard_version_behind",
            "1 while the files hold another bank or policy than the one in use: not read yet, or refused.",
            "livemax",
            self.registry,
            ("what",),
        )
        self._ready = _gauge("sailguard_ready", "1 while requests can be judged.", "livemin", self.registry)
        self._queue_depth = _gauge("sailguard_queue_depth", "Requests waiting for the model.", "livesum", self.registry)
        self._in_flight = _gauge("sailguard_requests_in_flight", "Requests being served.", "livesum", self.registry)
        self._refused = Counter(
            "sailguard_refused",
            "Requests that were turned away before they were judged, by the reason.",
            ["reason"],
            registry=self.registry,
        )
        self._batch_texts = Histogram(
            "sailguard_batch_texts",
            "Texts judged in one pass of the model.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self._audit_entries = Counter(
            "sailguard_audit_entries", "Entries written to the audit.", registry=self.registry
        )
        self._audit_errors = Counter(
            "sailguard_audit_errors",
            "Entries that could not be written to the audit, by what the policy made of it.",
            ["on_error"],
            registry=self.registry,
        )
        self._spool_items = Counter(
            "sailguard_spool_items",
            "Items written to the spool, by why they are kept.",
            ["why"],
            registry=self.registry,
        )
        self._spool_dropped = Counter(
            "sailguard_spool_dropped",
            "Items that the spool had no room for, or could not write.",
            ["reason"],
            registry=self.registry,
        )
        # Of processes that share a page the one is shown that has moved farthest.
        self._drift_flag = _gauge(
            "sailguard_drift_flag_ratio",
            "Share of sampled texts that are flagged, over the false-positive rate of the policy's thresholds.",
            "livemax",
            self.registry,
            ("domain",),
        )
        self._drift_firing = _gauge(
            "sailguard_drift_firing_ratio",
            "How often a domain's features are active in sampled texts, over how often in the bank's corpus.",
            "livemax",
            self.registry,
            ("domain",),
        )
        self._drift_psi = _gauge(
            "sailguard_drift_activation_psi",
            "Population stability index of the strength of a domain's features, against the bank's corpus.",
            "livemax",
            self.registry,
            ("domain",),
        )
        self._shadow_texts = Counter(
            "sailguard_shadow_texts",
            "Texts and answers that a candidate bank was to judge beside the one in use, by what came of it.",
            ["result"],
            registry=self.registry,
        )
        self._shadow_disagreements = Counter(
            "sailguard_shadow_disagreements",
            "Decisions of a candidate bank that differ from those of the one in use.",
            ["domain", "kind"],
            registry=self.registry,
        )
        self._reloads = Counter(
            "sailguard_reloads",
            "New versions of the bank or the policy, by whether they were taken into use.",
            ["what", "result"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "sailguard_request_seconds",
            "Time from the first byte of an HTTP request to the last byte of its response.",
            ["endpoint", "status"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._feature_activation = Histogram(
            "sailguard_feature_activation",
            "Activation of a feature where it fired, in units of its 99.9th percentile.",
            ["feature"],
            buckets=_ACTIVATION_BUCKETS,
            registry=self.registry,
        )
        self._feature_drops = Counter(
            "sailguard_feature_drops",
            "Features that were asked for beyond the number that is shown.",
            registry=self.registry,
        )
        wanted = tuple(dict.fromkeys(features))
        self._features = {feature: self._feature_activation.labels(feature=feature) for feature in wanted[:FEATURE_CAP]}
        self._feature_drops.inc(len(wanted[FEATURE_CAP:]))
        self._make_known_series()

    def _make_known_series(self) -> None:
        for phase in _PHASES:
            for result in _RESULTS:
                self._requests.labels(phase=phase, result=result)
        for on_error in _ON_ERROR:
            self._errors.labels(on_error=on_error)
            self._audit_errors.labels(on_error=on_error)
        for why in _SPOOLED:
            self._spool_items.labels(why=why)
        for reason in _SPOOL_DROPS:
            self._spool_dropped.labels(reason=reason)
        for result in _SHADOWED:
            self._shadow_texts.labels(result=result)
        for reason in _REFUSALS:
            self._refused.labels(reason=reason)
        for what in _RELOADED:
            self._behind.labels(what=what)
            for result in _RELOADS:
                self._reloads.labels(what=what, result=result)

    @property
    def features(self) -> tuple[str, ...]:
        """Ids of the features whose activations are shown."""
        return tuple(self._features)

    def count_request(self, phase: str, result: str) -> None:
        """Count one judged sequence.

        `phase` is prompt or response, `result` is allow, flag, steer, block or error.
        """
        self._requests.labels(phase=phase, result=result).inc()

    def count_verdict(self, verdict: Verdict) -> None:
        """Count one verdict under its domain and action."""
        self._verdicts.labels(domain=verdict.domain, action=verdict.action).inc()

    def observe_scores(self, scores: Mapping[str, float]) -> None:
        """Record the highest probability per domain (0..1) of one judged sequence."""
        for domain, score in scores.items():
            self._domain_score.labels(domain=domain).observe(score)

    def observe_step(self, seconds: float) -> None:
        """Record the time in seconds that the guard added to one forward pass."""
        self._step_overhead.observe(seconds)

    def observe_pass(self, seconds: float) -> None:
        """Record the time in seconds of one whole forward pass; `observe_step` has the guard's share of it."""
        self._pass_seconds.inc(seconds)

    def count_tokens(self, observed: int, generated: int) -> None:
        """Add to the two token counters; their ratio is the guard's coverage and has to stay at 1."""
        self._tokens_observed.inc(observed)
        self._tokens_generated.inc(generated)

    def count_error(self, on_error: str) -> None:
        """Count one internal error under what the policy made of it: block, flag or allow."""
        self._errors.labels(on_error=on_error).inc()

    def set_bank(self, *, name: str, version: str, model: str, content_hash: str = "") -> None:
        """Publish which bank is in use; `model` is the id of the model that it was made for."""
        self._bank.show(name, version, model, content_hash)

    def set_policy(self, *, name: str, version: str, on_error: str = "") -> None:
        """Publish which policy is in use and what it does on an internal error."""
        self._policy.show(name, version, on_error)

    def set_behind(self, what: str, behind: bool) -> None:
        """Say whether the files of `what`, bank or policy, hold another version than the one in use."""
        self._behind.labels(what=what).set(1.0 if behind else 0.0)

    def observe_feature(self, feature_id: str, activation: float) -> None:
        """Record a feature that fired, by its highest activation in a judged sequence.

        `activation` is in units of the feature's 99.9th percentile. A feature that is not shown, or that did not
        fire (an activation of 0 or less), changes nothing.
        """
        shown = self._features.get(feature_id)
        if shown is not None and activation > 0.0:
            shown.observe(activation)

    def observe_batch(self, texts: int) -> None:
        """Record how many texts one pass of the model judged."""
        self._batch_texts.observe(texts)

    def set_ready(self, ready: bool) -> None:
        """Say whether requests can be judged."""
        self._ready.set(1.0 if ready else 0.0)

    def in_flight(self, delta: int) -> None:
        """Add to the requests being served: 1 when one arrives, -1 when it has ended."""
        self._in_flight.inc(delta)

    def count_refusal(self, reason: str) -> None:
        """Count one request that was turned away.

        `reason` is queue, rate, concurrency, timeout, not_ready, auth, host or size.
        """
        self._refused.labels(reason=reason).inc()

    def count_audit_entry(self) -> None:
        """Count one entry that the audit holds durably."""
        self._audit_entries.inc()

    def count_audit_error(self, on_error: str) -> None:
        """Count one entry that could not be written, under what the policy made of it: block, flag or allow."""
        self._audit_errors.labels(on_error=on_error).inc()

    def count_spool_item(self, why: str) -> None:
        """Count one item of the spool that is on the disk: `why` is sampled or verdict."""
        self._spool_items.labels(why=why).inc()

    def count_spool_drop(self, reason: str) -> None:
        """Count one that was dropped: `reason` is full or error."""
        self._spool_dropped.labels(reason=reason).inc()

    def set_drift(self, domain: str, *, flag: float | None, firing: float | None, psi: float | None) -> None:
        """Show how far a domain has moved from the bank's own texts; what is None is not known yet."""
        for gauge, value in ((self._drift_flag, flag), (self._drift_firing, firing), (self._drift_psi, psi)):
            if value is not None:
                gauge.labels(domain=domain).set(value)

    def count_shadow_text(self, result: str) -> None:
        """Count one text that a candidate bank was to judge; `result` is judged, skipped or error."""
        self._shadow_texts.labels(result=result).inc()

    def count_shadow_disagreement(self, domain: str, kind: str) -> None:
        """Count one decision that differs: `kind` is only_current or only_candidate."""
        self._shadow_disagreements.labels(domain=domain, kind=kind).inc()

    def count_reload(self, what: str, result: str) -> None:
        """Count one new version of `what`, bank or policy, with its `result`, ok or refused."""
        self._reloads.labels(what=what, result=result).inc()

    def queued(self, delta: int) -> None:
        """Add to the requests that wait for the model: 1 when one begins to wait, -1 when it has ended to."""
        self._queue_depth.inc(delta)

    def observe_request(self, seconds: float, *, endpoint: str, status: int) -> None:
        """Record one HTTP request: its duration in seconds, its endpoint's short name and its status."""
        self._request_seconds.labels(endpoint=endpoint, status=str(status)).observe(seconds)

    def render(self) -> bytes:
        """Return every series in Prometheus' plain text format, see `CONTENT_TYPE`.

        Where several processes share a folder, of all of them. Raises GuardError if this process began to count
        before it was told of the folder: its page would then show one process and pass for all.
        """
        if _shared():
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        if os.environ.get(_FOLDER):
            raise GuardError(f"{_FOLDER} was set after the metrics were made: set it before the process starts")
        return generate_latest(self.registry)


class _InUse:
    """A gauge with labels that is 1 for one set of them: what is in use."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._gauge = _gauge(name, documentation, "livemax", registry, labels)
        self._lock = threading.Lock()
        self._shown: tuple[str, ...] | None = None

    def show(self, *labels: str) -> None:
        """Publish what is in use now, in place of what was before."""
        with self._lock:
            before, self._shown = self._shown, labels
            self._gauge.labels(*labels).set(1.0)
            if before is None or before == labels:
                return
            # In the files that processes share a series cannot be taken back.
            self._gauge.labels(*before).set(0.0)
            if not _shared():
                self._gauge.remove(*before)


_Mode = Literal["livesum", "livemin", "livemax"]


def _gauge(
    name: str, documentation: str, mode: _Mode, registry: CollectorRegistry, labels: tuple[str, ...] = ()
) -> Gauge:
    return Gauge(name, documentation, labels, multiprocess_mode=mode, registry=registry)


def _shared() -> bool:
    """Whether series are kept in files. The library decides it once, from the environment when it is imported."""
    return values.ValueClass is not values.MutexValue

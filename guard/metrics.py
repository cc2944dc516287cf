"""The guard's Prometheus metrics: every metric name of the project stands in this file.

A `Metrics` object owns its registry, so two guards in one process, or two tests, never share a counter.
Units are base units; labels are small enums and never hold user, request or prompt data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

if TYPE_CHECKING:
    from guard.events import Verdict

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of `Metrics.render()`: the plain text format, which every Prometheus version reads."""

_SCORE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_STEP_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)

_PHASES = ("prompt", "response")
_RESULTS = ("allow", "flag", "steer", "block", "error")
_ON_ERROR = ("block", "flag", "allow")


class Metrics:
    """Counters, histograms and info series of one guard and of the server in front of it.

    `registry` takes the series; without one a fresh registry is made. All methods may be called from
    any thread. Series whose labels are known beforehand exist from the start with the value 0, so that
    an alert on their rate also sees the first event.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
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
        self._bank = Info("sailguard_bank", "The feature bank in use.", registry=self.registry)
        self._policy = Info("sailguard_policy", "The policy in use.", registry=self.registry)
        self._queue_depth = Gauge("sailguard_queue_depth", "Requests waiting for the model.", registry=self.registry)
        self._request_seconds = Histogram(
            "sailguard_request_seconds",
            "Time from the first byte of an HTTP request to the last byte of its response.",
            ["endpoint", "status"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        for phase in _PHASES:
            for result in _RESULTS:
                self._requests.labels(phase=phase, result=result)
        for on_error in _ON_ERROR:
            self._errors.labels(on_error=on_error)

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

    def count_tokens(self, observed: int, generated: int) -> None:
        """Add to the two token counters; their ratio is the guard's coverage and has to stay at 1."""
        self._tokens_observed.inc(observed)
        self._tokens_generated.inc(generated)

    def count_error(self, on_error: str) -> None:
        """Count one internal error under what the policy made of it: block, flag or allow."""
        self._errors.labels(on_error=on_error).inc()

    def set_bank(self, *, name: str, version: str, model: str, content_hash: str = "") -> None:
        """Publish which bank is in use; `model` is the id of the model that it was made for."""
        self._bank.info({"name": name, "version": version, "model": model, "content_hash": content_hash})

    def set_policy(self, *, name: str, version: str, on_error: str = "") -> None:
        """Publish which policy is in use and what it does on an internal error."""
        self._policy.info({"name": name, "version": version, "on_error": on_error})

    def set_queue_depth(self, waiting: int) -> None:
        """Set how many requests wait for the model; the one being served does not count."""
        self._queue_depth.set(waiting)

    def observe_request(self, seconds: float, *, endpoint: str, status: int) -> None:
        """Record one HTTP request: its duration in seconds, its endpoint's short name and its status."""
        self._request_seconds.labels(endpoint=endpoint, status=str(status)).observe(seconds)

    def render(self) -> bytes:
        """Return every series in Prometheus' plain text format, see `CONTENT_TYPE`."""
        return generate_latest(self.registry)

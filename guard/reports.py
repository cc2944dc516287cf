"""From the state of sequences to their reports and their metrics."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from typing import Any

from feature_bank.bank import Bank
from guard.events import SEVERITY, ActionName, SequenceReport
from guard.judge import Judge, sigmoid
from guard.metrics import Metrics
from guard.policy import Policy
from guard.state import BatchState


class OrderedReports(list[SequenceReport]):
    """Reports of sequences that end in another order than they began in, kept in the order of their beginning.

    Whoever reads them may take them away with `clear()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers: list[int] = []

    def put(self, number: int, report: SequenceReport) -> None:
        """Add the report of the sequence that was the `number`-th to begin."""
        if not self:
            self._numbers.clear()
        place = bisect(self._numbers, number)
        self._numbers.insert(place, number)
        self.insert(place, report)


def make_reports(monitor: Judge, state: BatchState) -> list[SequenceReport]:
    """The report of every sequence of a batch, in order."""
    return [make_report(monitor, state, row) for row in range(len(state.request_ids))]


def make_report(monitor: Judge, state: BatchState, row: int) -> SequenceReport:
    """The report of the sequence in one row."""
    domains = monitor.domains
    verdicts = tuple(state.verdicts[row])
    actions: list[ActionName] = ["allow", *(verdict.action for verdict in verdicts)]
    if state.failed[row] and monitor.policy.on_error == "flag":
        actions.append("flag")
    if state.blocked[row]:
        actions.append("block")
    return SequenceReport(
        request_id=state.request_ids[row],
        action=max(actions, key=SEVERITY.__getitem__),
        verdicts=verdicts,
        prompt_scores={d: sigmoid(float(state.best_prompt[row, i])) for i, d in enumerate(domains)},
        response_scores={d: sigmoid(float(state.best_response[row, i])) for i, d in enumerate(domains)},
        tokens_generated=state.generated[row],
        tokens_observed=state.observed[row],
    )


def count_reports(metrics: Metrics, reports: Sequence[SequenceReport], *, failed: bool) -> None:
    """Add finished sequences to the metrics. failed: whether the guard itself failed while they ran."""
    for report in reports:
        answered = report.tokens_generated > 0
        metrics.count_tokens(report.tokens_observed, report.tokens_generated)
        metrics.observe_scores(report.response_scores if answered else report.prompt_scores)
        metrics.count_request("response" if answered else "prompt", "error" if failed else report.action)


def publish(metrics: Metrics, bank: Bank, policy: Policy) -> None:
    """Say in the metrics which bank and policy are in use."""
    manifest = bank.manifest
    metrics.set_bank(
        name=manifest.name, version=manifest.version, model=manifest.model.id, content_hash=bank.content_hash[:12]
    )
    metrics.set_policy(name=policy.name, version=policy.version, on_error=policy.on_error)


class ShownFeatures:
    """The features whose activations the metrics show, by their places in a bank."""

    def __init__(self, metrics: Metrics, bank: Bank) -> None:
        self._metrics = metrics
        wanted = set(metrics.features)
        self._places = {feature.id: i for i, feature in enumerate(bank.features) if feature.id in wanted}

    def observe(self, feature_acts: Any) -> None:
        """Take the activations (n, F) of one judged sequence: each feature counts with its highest."""
        if self._places and len(feature_acts):
            highest = feature_acts[:, list(self._places.values())].max(0)
            values = getattr(highest, "values", highest)  # torch gives the indices, too
            for feature, value in zip(self._places, values.tolist(), strict=True):
                self._metrics.observe_feature(feature, value)

"""The guard in the process that talks to clients: what it found, by request, and metrics beside vLLM's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Any, NamedTuple

import prometheus_client

from guard.engines.vllm.config import Config
from guard.errors import GuardError
from guard.events import SEVERITY, ActionName, SequenceReport, Verdict
from guard.metrics import Metrics
from guard.reports import count_reports

_KEPT = 4096  # finished requests whose reports wait for whoever writes the response


class Found(NamedTuple):
    """What the guard found in one answer."""

    report: SequenceReport
    refusal: str
    """What is said in place of an answer that is blocked; else empty."""
    policy: str
    """The version of the policy that it was judged under."""


class Frontend:
    """What the guard found in the requests of this process, and what that adds up to."""

    def __init__(self, guard: Config, metrics: Metrics) -> None:
        self.guard = guard
        self.metrics = metrics
        self._lock = Lock()
        self._found: dict[str, Found] = {}
        self._verdicts: dict[str, list[Verdict]] = {}
        self._kept: OrderedDict[str, dict[int, Found]] = OrderedDict()
        manifest, policy = guard.bank.manifest, guard.tenants[""].policy
        metrics.set_bank(
            name=manifest.name,
            version=manifest.version,
            model=manifest.model.id,
            content_hash=guard.bank.content_hash[:12],
        )
        metrics.set_policy(name=policy.name, version=policy.version, on_error=policy.on_error)

    def arrived(self, request_id: str, payload: Mapping[str, Any]) -> None:
        """The engine tells of one of its requests: which rules have fired so far, or at its end its report, with what
        was counted since the last one."""
        if "report" not in payload:
            self._verdicts[request_id] = [Verdict.from_dict(verdict) for verdict in payload["verdicts"]]
            return
        report = SequenceReport.from_dict(payload["report"])
        for seconds in payload["step_seconds"]:
            self.metrics.observe_step(seconds)
        for on_error, count in payload["errors"].items():
            for _ in range(count):
                self.metrics.count_error(on_error)
        for verdict in report.verdicts:
            self.metrics.count_verdict(verdict)
        count_reports(self.metrics, [report], failed=payload["failed"])
        self._found[request_id] = Found(report, payload["refusal"], payload["policy"])

    def finished(self, request_id: str, client_id: str, index: int) -> Found:
        """What was found in an answer that has ended; kept for `fetch` too.

        Of one that this process has ended itself, for a stop string or because its client left, the engine's report is
        still to come: then it is what is known so far.
        """
        found = self._found.get(request_id)
        if found is None:
            verdicts = tuple(self._verdicts.get(request_id, ()))
            actions: list[ActionName] = ["allow", *(verdict.action for verdict in verdicts)]
            report = SequenceReport(
                request_id=request_id,
                action=max(actions, key=SEVERITY.__getitem__),
                verdicts=verdicts,
                prompt_scores={},
                response_scores={},
                tokens_generated=0,
                tokens_observed=0,
            )
            policy = verdicts[0].policy_version if verdicts else self.guard.tenants[""].policy.version
            found = Found(report, "", policy)
        with self._lock:
            self._kept.setdefault(client_id, {})[index] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def forget(self, request_ids: Iterable[str]) -> None:
        """The engine has nothing more to tell of these requests."""
        for request_id in request_ids:
            self._found.pop(request_id, None)
            self._verdicts.pop(request_id, None)

    def fetch(self, client_id: str) -> dict[int, Found]:
        """What was found in the answers to a client's request, by index, and forget it.

        Of a request with several prompts, which vLLM numbers `ID-0` and so on, in those to all prompts in order.
        """
        with self._lock:
            whole = self._kept.pop(client_id, None)
            if whole is not None:
                return whole
            parts: list[Found] = []
            number = 0
            while (part := self._kept.pop(f"{client_id}-{number}", None)) is not None:
                parts += [part[index] for index in sorted(part)]
                number += 1
            return dict(enumerate(parts))


_FRONTENDS: list[Frontend] = []


def current() -> Frontend:
    """The frontend of this process. Raises GuardError if no engine of it has been configured with a guard."""
    if not _FRONTENDS:
        raise GuardError("no engine of this process is under the guard")
    return _FRONTENDS[-1]


def attach(guard: Config) -> Frontend:
    """Make this process's frontend; the metrics of an earlier one go on."""
    # vLLM's `/metrics` shows the process's own registry
    metrics = _FRONTENDS[-1].metrics if _FRONTENDS else Metrics(prometheus_client.REGISTRY)
    _FRONTENDS[:] = [Frontend(guard, metrics)]
    return _FRONTENDS[-1]

"""What has been sampled and may not leave yet: the scheduler's side of the guard.

A token is judged in the pass that reads it, one step after it was sampled. Until then, and until the first tokens that
a rule needs for its evidence are there, the engine's outputs wait here, whole and in order. The last output of an
answer leaves with its report, and if the report says so nothing that waited leaves at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from guard.engines.vllm.watch import News

PAYLOAD = "sailguard"


class Output(Protocol):
    """One step's output of one request, as the engine hands it to its clients."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any


class Shapes(NamedTuple):
    """How the engine's outputs are changed; it alone knows what they are made of."""

    final: Callable[[Any, bool, Mapping[str, Any]], Any]
    """(its last output, whether its last token is to be left out, payload) -> the output that ends the request."""
    note: Callable[[Any, Mapping[str, Any]], Any]
    """(an output, payload) -> the same with the payload."""
    blocked: Callable[[str, Any, Mapping[str, Any]], Any]
    """(request id, its first output if none has left, payload) -> the output that ends a blocked request."""
    gone: Callable[[str, Mapping[str, Any]], Any]
    """(request id, payload) -> an output that brings the report of a request whose client has left."""


class _Held:
    def __init__(self, client: int, ends: frozenset[int]) -> None:
        self.client = client
        self.ends = ends
        self.outputs: deque[Any] = deque()
        self.left = 0
        self.called_off = False
        self.report: Mapping[str, Any] | None = None
        self.untold: list[dict[str, Any]] | None = None

    @property
    def complete(self) -> bool:
        """Whether its end and its report are both there."""
        ended = bool(self.outputs) and self.outputs[-1].finish_reason is not None
        return self.report is not None and (ended or self.called_off)


class Ledger:
    """The outputs that wait, by request. `settle` is called once a step."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._held: dict[str, _Held] = {}
        self._steps: list[float] = []
        self._errors: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """Requests whose report has not come."""
        return len(self._held)

    def add(self, request_id: str, client: int, ends: frozenset[int]) -> None:
        """A request has come. ends: the tokens that end it, of which no text is shown."""
        self._held[request_id] = _Held(client, ends)

    def gone(self, request_id: str) -> None:
        """Its client has called it off: of what waits nothing leaves, only its report is still to come."""
        held = self._held.get(request_id)
        if held is not None:
            held.called_off = True
            held.outputs.clear()

    def settle(self, outputs: Mapping[int, list[Any]], news: News) -> dict[int, list[Any]]:
        """Take a step's outputs, by client, and return those that may leave."""
        if news.seconds:
            self._steps.append(news.seconds)
        for kind, count in news.errors.items():
            self._errors[kind] = self._errors.get(kind, 0) + count
        leaving: dict[int, list[Any]] = {}
        touched: dict[str, None] = {}
        for client, given in outputs.items():
            for output in given:
                held = self._held.get(output.request_id)
                if held is None:  # it has been ended by the guard, or is no request for text
                    if output.finish_reason is not None and not output.new_token_ids:
                        leaving.setdefault(client, []).append(output)
                    continue
                held.outputs.append(output)
                touched[output.request_id] = None
        for request_id, report in news.reports.items():
            if request_id in self._held:
                self._held[request_id].report = report
                touched[request_id] = None
        for request_id in news.unknown:
            held = self._held.pop(request_id, None)
            if held is not None:  # the engine has ended it before its first pass
                ended = [output for output in held.outputs if not output.new_token_ids]
                leaving.setdefault(held.client, []).extend(ended)
        for request_id, verdicts in news.verdicts.items():
            if request_id in self._held:
                self._held[request_id].untold = verdicts
        for request_id in touched:
            held = self._held.get(request_id)
            if held is None:
                continue
            ready = self._ready(request_id, held, news.release.get(request_id, 0))
            if ready:
                leaving.setdefault(held.client, []).extend(ready)
        return leaving

    def _ready(self, request_id: str, held: _Held, release: int) -> list[Any]:
        if held.report is not None and held.report["action"] == "block":
            first = held.outputs[0] if held.outputs and not held.left else None
            del self._held[request_id]
            return [self._shapes.blocked(request_id, first, self._payload(held.report))]
        ready: list[Any] = []
        while held.outputs and held.outputs[0].finish_reason is None:
            if not held.complete and held.left + len(held.outputs[0].new_token_ids) > release:
                return ready
            output = held.outputs.popleft()
            held.left += len(output.new_token_ids)
            if held.untold is not None:  # an answer that a stop string ends leaves without a report
                output, held.untold = self._shapes.note(output, {PAYLOAD: {"verdicts": held.untold}}), None
            ready.append(output)
        if held.report is None or not held.complete:
            return ready
        del self._held[request_id]
        payload = self._payload(held.report)
        if not held.outputs:
            return [*ready, self._shapes.gone(request_id, payload)]
        last = held.outputs.popleft()
        unread = bool(last.new_token_ids) and last.new_token_ids[-1] not in held.ends
        return [*ready, self._shapes.final(last, unread, payload)]

    def _payload(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """What a client's process is told: the report, and what was counted since the last one."""
        payload = {**report, "step_seconds": self._steps, "errors": self._errors}
        self._steps, self._errors = [], {}
        return {PAYLOAD: payload}

"""Whatever the order of outputs, releases and reports: no token leaves unjudged, and each answer ends exactly once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.engines.vllm.ledger import PAYLOAD, Ledger, Shapes
from guard.engines.vllm.watch import News

END = 2
ENDS = frozenset({END})


@dataclass(frozen=True)
class Out:
    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "output"

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = self.payload[PAYLOAD]
        return found


def final(last: Out, unread: bool, payload: Mapping[str, Any]) -> Out:
    tokens = last.new_token_ids[:-1] if unread else last.new_token_ids
    return replace(last, new_token_ids=tokens, payload=payload, kind="final")


def blocked(request_id: str, first: Out | None, payload: Mapping[str, Any]) -> Out:
    return Out(request_id, [], "stop", payload, "blocked" if first is None else "blocked first")


SHAPES = Shapes(
    final=final,
    note=lambda output, payload: replace(output, payload=payload, kind="note"),
    blocked=blocked,
    gone=lambda request_id, payload: Out(request_id, [], "abort", payload, "gone"),
)


def ledger(*names: str) -> Ledger:
    made = Ledger(SHAPES)
    for name in names:
        made.add(name, 0, ENDS)
    return made


def settle(made: Ledger, *outputs: Out, **news: Any) -> list[Out]:
    return made.settle({0: list(outputs)}, News(**news)).get(0, [])


def report(action: str = "allow") -> dict[str, Any]:
    return {"action": action, "report": {}, "failed": False}


def tokens(outputs: list[Out]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_a_token_waits_until_it_is_released() -> None:
    made = ledger("a")
    assert settle(made, Out("a", [10]), release={"a": 0}) == []
    assert settle(made, Out("a", [11]), release={"a": 0}) == []
    assert tokens(settle(made, Out("a", [12]), release={"a": 2})) == [10, 11]
    assert tokens(settle(made, Out("a", [13]), release={"a": 3})) == [12]
    assert made.waiting == 1


@pytest.mark.parametrize(("last", "leaves"), [(99, []), (END, [END])])
def test_a_last_token_that_nobody_read_is_left_out_unless_it_is_an_end(last: int, leaves: list[int]) -> None:
    made = ledger("a")
    settle(made, Out("a", [10]), release={"a": 0})
    (first, end) = settle(made, Out("a", [last], "length"), release={"a": 1}, reports={"a": report()})
    assert (first.new_token_ids, first.kind) == ([10], "output")
    assert (end.new_token_ids, end.kind, end.finish_reason) == (leaves, "final", "length")
    assert made.waiting == 0


def test_the_end_waits_for_its_report_and_takes_all_that_waits_with_it() -> None:
    made = ledger("a")
    settle(made, Out("a", [10]), release={"a": 0})
    assert settle(made, Out("a", [11], "stop"), release={"a": 0}) == []
    assert settle(made) == []
    leaving = settle(made, reports={"a": report("flag")})
    assert [(o.kind, o.new_token_ids) for o in leaving] == [("output", [10]), ("final", [])]
    assert leaving[-1].told["action"] == "flag"


def test_a_report_that_comes_before_the_end_waits_for_it() -> None:
    made = ledger("a")
    assert settle(made, Out("a", [10]), release={"a": 0}, reports={"a": report()}) == []
    assert [o.kind for o in settle(made, Out("a", [END], "stop"), release={"a": 1})] == ["output", "final"]


@pytest.mark.parametrize("shown", [False, True])
def test_of_a_blocked_answer_nothing_that_waits_leaves(shown: bool) -> None:
    made = ledger("a")
    settle(made, Out("a", [10]), release={"a": 0})
    if shown:
        assert tokens(settle(made, Out("a", [11]), release={"a": 1})) == [10]
    (end,) = settle(made, Out("a", [12]), release={"a": 9}, reports={"a": report("block")})
    assert (end.kind, end.new_token_ids) == ("blocked" if shown else "blocked first", [])
    assert end.told["action"] == "block"
    assert made.waiting == 0
    assert settle(made, Out("a", [13]), release={"a": 9}) == []  # of a pass that was under way


def test_a_request_that_is_blocked_before_its_first_output_ends_too() -> None:
    (end,) = settle(ledger("a"), reports={"a": report("block")})
    assert end.kind == "blocked"


def test_of_a_request_that_was_called_off_only_its_report_comes() -> None:
    made = ledger("a")
    settle(made, Out("a", [10]), release={"a": 0})
    made.gone("a")
    made.gone("never seen")
    assert settle(made) == []
    (end,) = settle(made, reports={"a": report("flag")})
    assert (end.kind, end.told["action"], end.new_token_ids) == ("gone", "flag", [])
    assert made.waiting == 0
    assert settle(made, reports={"a": report("flag")}) == []


def test_verdicts_ride_on_the_next_output_that_leaves() -> None:
    made = ledger("a", "b")
    verdicts = [{"rule": "one"}]
    settle(made, Out("a", [10]), Out("b", [20]), release={"a": 0, "b": 0}, verdicts={"a": verdicts, "gone": []})
    first, other = settle(made, Out("a", [11]), Out("b", [21]), release={"a": 1, "b": 1})
    assert (first.kind, first.told) == ("note", {"verdicts": verdicts})
    assert (other.request_id, other.kind) == ("b", "output")
    (second,) = settle(made, Out("a", [12]), release={"a": 2})
    assert second.kind == "output"


def test_times_and_errors_are_handed_on_exactly_once() -> None:
    made = ledger("a", "b")
    settle(made, Out("a", [1]), release={"a": 0}, seconds=0.25, errors={"flag": 1})
    settle(made, seconds=0.5, errors={"flag": 1, "block": 1})
    (_, end) = settle(made, Out("a", [END], "stop"), release={"a": 1}, reports={"a": report()}, seconds=1.0)
    assert end.told["step_seconds"] == [0.25, 0.5, 1.0]
    assert end.told["errors"] == {"flag": 2, "block": 1}
    (end,) = settle(made, reports={"b": report("block")}, seconds=2.0)
    assert (end.told["step_seconds"], end.told["errors"]) == ([2.0], {})


def test_what_is_no_request_of_the_guard_passes_with_its_end_only() -> None:
    made = ledger()
    assert settle(made, Out("other", [1])) == []
    assert settle(made, Out("other", [1], "stop")) == [], "nor does its end, if a token comes with it"
    assert [o.kind for o in settle(made, Out("other", [], "abort"))] == ["output"]


def test_outputs_go_to_the_client_that_asked() -> None:
    made = Ledger(SHAPES)
    made.add("a", 0, ENDS)
    made.add("b", 3, ENDS)
    leaving = made.settle({0: [Out("a", [1])], 3: [Out("b", [2])]}, News(release={"a": 1, "b": 1}))
    assert {client: tokens(outputs) for client, outputs in leaving.items()} == {0: [1], 3: [2]}
    leaving = made.settle({}, News(reports={"b": report("block")}))
    assert [(client, o.kind) for client, (o,) in leaving.items()] == [(3, "blocked")]


@given(seed=st.integers(0, 100_000))
def test_every_course_of_events_keeps_the_order_and_ends_each_request_once(seed: int) -> None:
    rng = random.Random(seed)
    made, left = Ledger(SHAPES), {f"r{n}": Course(rng) for n in range(rng.randint(1, 5))}
    for name, course in left.items():
        made.add(name, course.client, ENDS)
    seconds, told = 0.0, 0.0
    for step in range(1, 400):
        outputs: dict[int, list[Out]] = {}
        news = News(seconds=float(step))
        seconds += step
        for name, course in left.items():
            if rng.random() < 0.6:
                course.advance(name, made, outputs, news)
        for client, leaving in made.settle(outputs, news).items():
            for output in leaving:
                left[output.request_id].leaves(output, client)
                told += sum(output.told["step_seconds"]) if output.finish_reason else 0.0
        if not made.waiting:
            break
    assert made.waiting == 0
    assert all(course.ended == 1 for course in left.values())
    assert told == seconds
    for course in left.values():
        course.check()


class Course:
    """One request's life, step by step, and what has left of it."""

    def __init__(self, rng: random.Random) -> None:
        self.client = rng.randint(0, 1)
        self.hold = rng.choice([0, 0, 3])
        self.end = rng.choice(["length", "stop", "block", "late report", "called off"])
        self.tokens = rng.sample(range(10, 99), rng.randint(1, 12))
        if self.end == "stop":
            self.tokens[-1] = END
        self.sampled = 0
        self.released = 0
        self.over = self.reported = False
        self.left: list[int] = []
        self.ended = 0

    def advance(self, name: str, made: Ledger, outputs: dict[int, list[Out]], news: News) -> None:
        if self.over:
            if not self.reported:
                news.reports[name] = report()
                self.reported = True
            return
        last = self.sampled == len(self.tokens) - 1
        if last and self.end == "called off":
            made.gone(name)
            self.over = True
            return
        judged = self.sampled if self.sampled >= self.hold else 0
        news.release[name] = judged
        if not (last and self.end == "block"):
            self.released = max(self.released, judged)
        reason = None
        if last:
            self.over, self.reported = True, self.end not in ("late report",)
            reason = "stop" if self.end == "stop" else "length"
            if self.reported:
                news.reports[name] = report("block" if self.end == "block" else "flag")
            if self.end == "block":
                reason = None
        outputs.setdefault(self.client, []).append(Out(name, [self.tokens[self.sampled]], reason))
        self.sampled += 1

    def leaves(self, output: Out, client: int) -> None:
        assert client == self.client
        assert not self.ended, "nothing leaves after the end"
        self.left += output.new_token_ids
        if output.finish_reason is None:
            assert self.reported or len(self.left) <= self.released
        else:
            self.ended += 1
            assert self.over
            assert self.reported
            assert output.kind.split()[0] == {"block": "blocked", "called off": "gone"}.get(self.end, "final")

    def check(self) -> None:
        assert self.left == self.tokens[: len(self.left)]
        if self.end in ("length", "late report"):
            assert self.left == self.tokens[:-1]
        elif self.end == "stop":
            assert self.left == self.tokens
        else:
            assert len(self.left) <= self.released

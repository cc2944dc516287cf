"""A request may bring steering of its own, and may be observed; neither touches the others, nor what is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank import DOMAINS
from feature_bank.heads import agreement
from feature_bank.layout import layout
from guard.core import Guard
from guard.errors import PolicyError
from guard.events import SequenceReport, TraceToken
from guard.serving import ServingGuard
from tests.factories import HOOKS, POOLING, make_policy
from tests.guard.conftest import VARIED, MakeBank
from tests.guard.continuous.conftest import Serve
from tests.guard.continuous.requests import CHATS, JOIN, STEER, Heard
from tests.guard.generation import BLOCK, FLAG_ALL

OWN = ("violence=6", "L3/10=clamp:3")


class Traced:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.prompts: list[Sequence[TraceToken]] = []
        self.tokens: list[TraceToken] = []

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        self.prompts.append(tokens)

    def token(self, token: TraceToken) -> None:
        self.tokens.append(token)

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def report_of(heard: Heard) -> SequenceReport:
    report = heard.wait().generation.report
    assert report is not None
    return report


def highest(tokens: Sequence[TraceToken], segments: Sequence[int], settled: int) -> dict[str, float]:
    """The highest probability that as many tokens agree on as the bank asks for."""
    scores = np.array([[token.scores[domain] for domain in DOMAINS] for token in tokens])
    agreed = agreement(scores, np.array(segments), POOLING.evidence_tokens, settled=settled)
    return dict(zip(DOMAINS, agreed.max(0).tolist(), strict=True))


# ---- steering that a request brings --------------------------------------------------------------------------


def test_a_steered_request_is_what_it_is_alone_and_so_are_those_beside_it(serve: Serve) -> None:
    serving = serve(*FLAG_ALL)
    free = [Heard(serving, chat).wait().text for chat in CHATS]
    steered = [Heard(serving, chat, steer=OWN).wait().text for chat in CHATS]
    assert all(one != other for one, other in zip(free, steered, strict=True))
    pairs = [(Heard(serving, chat), Heard(serving, chat, steer=OWN)) for chat in CHATS]
    assert [(one.wait().text, other.wait().text) for one, other in pairs] == list(zip(free, steered, strict=True))


def test_to_ask_for_no_steering_changes_no_bit(serve: Serve) -> None:
    serving = serve(*FLAG_ALL)
    reports = [report_of(Heard(serving, CHATS[1], **options)) for options in ({}, {"steer": ()})]
    assert reports[0].response_scores == reports[1].response_scores
    assert reports[0].prompt_scores == reports[1].prompt_scores


def test_the_prompt_is_judged_as_it_would_be_without(serve: Serve) -> None:
    serving = serve(*FLAG_ALL)
    for chat in CHATS:
        free, steered = report_of(Heard(serving, chat)), report_of(Heard(serving, chat, steer=OWN))
        assert free.prompt_scores == steered.prompt_scores
        assert free.response_scores != steered.response_scores
        assert steered.tokens_observed == steered.tokens_generated == 20


def test_steered_positions_are_those_from_the_prompts_last_token_on(serve: Serve, chatty: Any) -> None:
    """Seen by a hook of its own, at the first hook point; the steering is too weak to change a token."""
    serving = serve()
    continuous = serving._shared.attached.engine.continuous

    def run(**options: Any) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def see(_: Any, _args: Any, output: Any) -> None:
            hidden = (output if isinstance(output, Tensor) else output[0])[0]
            for _, share, _ in continuous._pass:
                for i in range(len(share.ids)):
                    found[share.position + i] = hidden[share.start + i].clone()

        handle = chatty.model.layers[int(HOOKS[0].split(".")[1])].register_forward_hook(see)
        Heard(serving, CHATS[1], 6, **options).wait()
        handle.remove()
        return found

    free, steered = run(), run(steer=("violence=0.0001",))
    prompt = len(serving.prompt_ids(CHATS[1]))
    assert free.keys() == steered.keys()
    for position, hidden in free.items():
        assert torch.equal(hidden, steered[position]) == (position < prompt - 1), position


def test_a_rule_that_fires_comes_on_top_and_its_release_leaves_the_requests_own(serve: Serve) -> None:
    """The rule asks for the very steering that the request has; what it lets go of is its own."""
    serving, steer = serve(), ("violence=6",)
    traces = [Traced() for _ in CHATS]
    found = [Heard(serving, chat, 40, trace, steer=steer) for chat, trace in zip(CHATS, traces, strict=True)]
    expected = [one.wait().text for one in found]
    middle = float(np.median([token.scores["violence"] for trace in traces for token in trace.tokens]))
    rule = {**STEER, "scope": ["response"], "steer": {"op": "add", "strength": 6.0}, "cooldown_tokens": 1}
    serving = serve({**rule, "threshold": {"probability": middle}, "evidence_tokens": 1})
    found = [Heard(serving, chat, 40, steer=steer) for chat in CHATS]
    assert [one.wait().text for one in found] == expected
    assert max(len(report_of(one).verdicts) for one in found) > 1  # it was released on the way, and fired anew


@pytest.mark.parametrize("item", ["violence", "L99/1=2", "nothing=1", "violence=nan", "violence/none=1"])
def test_what_cannot_be_steered_by_is_refused_before_anything_begins(serve: Serve, item: str) -> None:
    serving = serve()
    with pytest.raises(PolicyError, match=item.split("=")[0]):
        serving.check_steering(["violence=1", item])
    with pytest.raises(PolicyError):
        Heard(serving, CHATS[0], steer=(item,))
    assert Heard(serving, CHATS[0]).wait().reason == "length"


# ---- observed requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steer", [(), OWN])
def test_a_trace_tells_of_every_token_what_the_report_sums_up(
    serve: Serve, tiny_tokenizer: Any, steer: tuple[str, ...]
) -> None:
    serving = serve(*FLAG_ALL)
    for chat in CHATS:
        traced = Traced()
        heard = Heard(serving, chat, observer=traced, steer=steer).wait()
        report = report_of(heard)
        ids = serving.prompt_ids(chat)
        (prompt,) = traced.prompts
        assert [token.token_id for token in prompt] == ids
        assert [token.index for token in prompt] == list(range(len(ids)))
        assert "".join(token.text for token in prompt) == tiny_tokenizer.decode(ids, skip_special_tokens=False)
        judged = [token for token in prompt if token.observed]
        segment = layout(ids, set(tiny_tokenizer.all_special_ids)).segment
        assert [token.segment for token in judged] == [segment[token.index] for token in judged]
        assert all(not token.scores and not token.features for token in prompt if not token.observed)
        segments = [token.segment or 0 for token in judged]
        assert highest(judged, segments, POOLING.window) == pytest.approx(report.prompt_scores, abs=1e-6)
        assert traced.text == heard.text
        assert [token.index for token in traced.tokens] == list(range(20))
        assert highest(traced.tokens, [0] * 20, POOLING.settle_tokens) == pytest.approx(
            report.response_scores, abs=1e-6
        )
        for token in [*judged, *traced.tokens]:
            strengths = [hit.activation for hit in token.features]
            assert strengths == sorted(strengths, reverse=True)
        assert any(len(token.features) > 5 for token in traced.tokens)


def test_to_be_observed_changes_nothing(serve: Serve) -> None:
    serving = serve(*FLAG_ALL)
    reports = [report_of(Heard(serving, CHATS[3], observer=observer)) for observer in (None, Traced())]
    assert reports[0].response_scores == reports[1].response_scores
    assert reports[0].prompt_scores == reports[1].prompt_scores


def test_a_traced_prompt_is_the_trace_of_its_text(serve: Serve) -> None:
    serving = serve(*FLAG_ALL)
    traced = Traced()
    Heard(serving, CHATS[1], 1, observer=traced).wait()
    text = CHATS[1][0]["content"]
    alone = serving.trace(text, top=None).tokens
    ((*prompt,),) = traced.prompts
    within = [token for token in prompt if token.observed][-len(alone) :]
    assert "".join(token.text for token in within) == text
    for one, other in zip(within, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert [hit.id for hit in one.features] == [hit.id for hit in other.features]
    short = serving.trace(text).tokens
    assert all(few.features == all_.features[:5] for few, all_ in zip(short, alone, strict=True))


def test_of_a_blocked_answer_nothing_is_told_that_is_not_shown(serve: Serve) -> None:
    serving = serve()
    scores = sorted(report_of(Heard(serving, chat)).response_scores["violence"] for chat in CHATS)
    serving = serve({**BLOCK, "scope": ["response"], "threshold": {"probability": (scores[1] + scores[2]) / 2}})
    traces = [Traced() for _ in CHATS]
    found = [Heard(serving, chat, observer=trace) for chat, trace in zip(CHATS, traces, strict=True)]
    assert sorted(str(one.wait().reason) for one in found) == ["content_filter"] * 2 + ["length"] * 2
    for one, trace in zip(found, traces, strict=True):
        blocked = one.reason == "content_filter"
        shown = "".join(event.text for event in (one.events[:-1] if blocked else one.events))
        assert trace.text == shown
        if blocked:
            assert len(trace.tokens) <= report_of(one).verdicts[0].token_index
        assert len(trace.prompts) == 1


def test_a_blocked_prompt_is_told_and_nothing_else(serve: Serve) -> None:
    serving = serve({**BLOCK, "scope": ["prompt"]}, violence=True)
    traced = Traced()
    assert Heard(serving, CHATS[1], observer=traced).wait().reason == "content_filter"
    assert len(traced.prompts) == 1
    assert not traced.tokens


def test_requests_without_an_observer_are_not_traced(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.engines import continuous

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(continuous, "show_prompt", fail)
    monkeypatch.setattr(continuous, "show_token", fail)
    assert Heard(serve(), CHATS[0]).wait().reason == "length"


@pytest.mark.parametrize("name", ["trace_tokens", "active_features"])
def test_an_error_of_tracing_ends_the_trace_and_not_the_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from guard.engines import observing

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("injected")

    serving = serve(*FLAG_ALL)
    free = Heard(serving, CHATS[0]).wait().text
    monkeypatch.setattr(observing, name, fail)
    traced = Traced()
    assert Heard(serving, CHATS[0], observer=traced).wait().text == free
    assert not traced.tokens
    assert len(traced.prompts) == (name == "active_features")


def test_under_another_bank_a_request_is_traced_and_steered_by_that_one(serve: Serve, bank_of: MakeBank) -> None:
    serving = serve()
    other = serving.replaced(Guard(bank_of(violence=True), make_policy()))

    def run(guard: ServingGuard) -> Traced:
        traced = Traced()
        Heard(guard, CHATS[0], observer=traced, steer=("violence=2",)).wait()
        return traced

    assert all(token.scores["violence"] > 0.99 for token in run(other).tokens)
    assert any(token.scores["violence"] < 0.99 for token in run(serving).tokens)


def test_a_cancelled_answer_tells_no_more_than_was_shown(serve: Serve) -> None:
    serving = serve()
    traced = Traced()
    heard = Heard(serving, CHATS[0], 1500, observer=traced)
    while not heard.events:
        pass
    serving.cancel(heard.generation)
    assert heard.ended.wait(JOIN)
    assert traced.text == heard.text


def test_traces_of_requests_side_by_side_are_those_of_each_alone(serve: Serve) -> None:
    serving = serve(*FLAG_ALL, **VARIED)

    def start() -> list[tuple[Traced, Heard]]:
        traces = [Traced() for _ in CHATS]
        return [(t, Heard(serving, chat, observer=t)) for t, chat in zip(traces, CHATS, strict=True)]

    together = start()
    for _, heard in together:
        heard.wait()
    for chat, (traced, _) in zip(CHATS, together, strict=True):
        alone = Traced()
        Heard(serving, chat, observer=alone).wait()
        assert alone.text == traced.text
        for one, other in zip(alone.tokens, traced.tokens, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-4)

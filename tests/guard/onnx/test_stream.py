"""An answer judged as it comes: the same whatever it is cut into, and nothing shown that was not judged."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from feature_bank.bank import Bank
from guard.capture import truncated_forward
from guard.encoder import SelectedEncoder
from guard.engines.onnx import OnnxEngine, Released
from guard.errors import GuardError
from guard.monitor import Monitor
from guard.reports import make_report
from tests.factories import make_policy
from tests.guard.onnx.conftest import Start

CPU = torch.device("cpu")
POLICY = make_policy(
    {"domain": "violence", "action": "flag", "threshold": {"probability": 0.6}},
    {"domain": "terror", "action": "flag", "threshold": {"probability": 0.55}, "evidence_tokens": 1},
    {"domain": "politics", "action": "block", "threshold": {"probability": 0.97}, "evidence_tokens": 2},
    {"domain": "pornography", "action": "block", "threshold": {"probability": 0.995}},
)
WORDS = ["ferry", "harbour", "a", "of", "the", "Zürich", "東京", "1874", "lamp,", "stone.\n", "🙂", "x" * 90, "  ", "é"]
texts = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
steady = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(ends)] or [""]


def run(engine: OnnxEngine, parts: list[str], **options: Any) -> tuple[list[Released], Any]:
    judge = engine.open_response(request_id="r", **options)
    found = [judge.push(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
    return found, judge.report()


def said(found: list[Released]) -> tuple[list[tuple[str, int]], str, bool]:
    verdicts = [(v.rule, v.token_index) for released in found for v in released.verdicts]
    return verdicts, "".join(released.text for released in found), found[-1].blocked


@steady
@given(text=texts, cuts=st.lists(st.integers(0, 400), max_size=12), step=st.integers(1, 20))
def test_what_is_found_and_shown_does_not_depend_on_how_the_text_is_cut(
    start: Start, text: str, cuts: list[int], step: int
) -> None:
    engine = start(POLICY)
    whole, report = run(engine, [text], step_tokens=1)
    cut, other = run(engine, pieces(text, cuts), step_tokens=step)
    assert said(cut) == said(whole)
    assert (other.action, other.tokens_observed) == (report.action, report.tokens_observed)
    assert other.response_scores == pytest.approx(report.response_scores, abs=1e-4)


@steady
@given(text=texts, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_all_that_is_shown_was_judged_before_and_stands_before_the_deciding_token(
    start: Start, text: str, cuts: list[int]
) -> None:
    engine = start(POLICY)
    judge, parts, shown = engine.open_response(step_tokens=1), pieces(text, cuts), ""
    for number, part in enumerate(parts):
        released = judge.push(part, last=number == len(parts) - 1)
        shown += released.text
        assert text.startswith(shown)
        observed = judge.report().tokens_observed  # one token a byte
        assert len(shown.encode()) <= observed - released.blocked
        if shown and (released.blocked or number < len(parts) - 1):
            assert observed - released.blocked >= engine._judge.hold_tokens
        if released.blocked:
            (verdict, *_) = [v for v in judge.report().verdicts if v.action == "block"]
            assert len(shown.encode()) <= verdict.token_index
            assert judge.push(" and more", last=True) == Released(text="", verdicts=(), blocked=True)
            return
    assert shown == text


@steady
@given(text=texts)
def test_verdicts_are_those_of_a_response_that_a_model_in_torch_streams(
    start: Start, bank: Bank, tiny_model: Any, tiny_tokenizer: Any, text: str
) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assume(0 < len(ids) <= 192)  # further on the left context is bounded
    monitor = Monitor(bank, POLICY, CPU)
    hidden = truncated_forward(tiny_model, bank.hook_names, torch.tensor([[tiny_tokenizer.bos_token_id, *ids]]))
    acts = SelectedEncoder(bank, CPU).encode({name: x[0, 1:] for name, x in hidden.items()})
    state = monitor.begin(["r"])
    for token in acts:
        monitor.observe_step(state, token[None])
        if state.blocked[0]:
            break
    else:
        monitor.finish(state)
    state.generated[0] = state.observed[0]
    expected = make_report(monitor, state, 0)
    _, report = run(start(POLICY), [text])
    assert [(v.rule, v.token_index, v.domain) for v in report.verdicts] == [
        (v.rule, v.token_index, v.domain) for v in expected.verdicts
    ]
    assert [v.score for v in report.verdicts] == pytest.approx([v.score for v in expected.verdicts], abs=1e-4)
    assert report.response_scores == pytest.approx(expected.response_scores, abs=1e-4)
    assert (report.action, report.tokens_observed) == (expected.action, expected.tokens_observed)


def test_the_examples_block_and_pass(start: Start) -> None:
    """The properties above are about something."""
    engine = start(POLICY)
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    found = [said(run(engine, [text])[0]) for text in texts]
    assert {blocked for *_, blocked in found} == {True, False}
    assert {rule for verdicts, *_ in found for rule, _ in verdicts} >= {"violence-flag", "politics-block"}
    assert any(blocked and shown for _, shown, blocked in found)


def test_several_answers_are_judged_together_as_each_alone(start: Start) -> None:
    engine = start(POLICY)
    answers = ["The ferry came in. " * 5, "", "Seven lamps of stone, 1874. " * 9, "x"]
    judges = [engine.open_response() for _ in answers]
    together: list[list[Released]] = [[] for _ in answers]
    for at in range(0, 260, 13):
        parts = [(j, answer[at : at + 13], at + 13 >= 260) for j, answer in zip(judges, answers, strict=True)]
        for row, released in zip(together, engine.push_all(parts), strict=True):
            row.append(released)
    for row, answer in zip(together, answers, strict=True):
        assert said(row) == said(run(engine, [answer])[0])


def test_a_long_answer_is_judged_to_its_end(start: Start) -> None:
    engine = start(make_policy({"domain": "politics", "action": "flag", "threshold": {"probability": 0.999}}))
    text = "The lighthouse keeper wrote the weather down four times a day. " * 20
    found, report = run(engine, [text[i : i + 50] for i in range(0, len(text), 50)])
    assert said(found)[1] == text
    assert report.tokens_observed == len(text)


def test_an_answer_that_has_ended_takes_no_more(start: Start) -> None:
    judge = start(POLICY).open_response()
    judge.push("All done.", last=True)
    with pytest.raises(GuardError, match="has ended"):
        judge.push("But wait.")


def test_two_halves_of_a_character_are_one_and_a_lone_half_is_replaced(start: Start) -> None:
    engine = start(make_policy())
    found, _ = run(engine, ["a \ud83d", "\ude42 b", " \ud83d"])
    assert said(found)[1] == "a 🙂 b \ufffd"


@pytest.mark.parametrize("policy", [None, POLICY])
def test_what_was_seen_of_an_answer_is_all_that_was_judged(start: Start, policy: Any) -> None:
    engine = start(policy)
    text = " ".join(WORDS * 3)
    assert engine.open_response().seen() is None
    judge = engine.open_response(keep=True)
    for piece in pieces(text, [7, 40, 90]):
        if judge.push(piece, last=text.endswith(piece)).blocked:
            break
    seen = judge.seen()
    assert seen is not None
    assert len(seen.segments) == judge.report().tokens_observed
    assert seen.acts.shape[1] == len(engine.bank.features)


def test_what_was_seen_of_a_text_is_what_it_was_scored_by(start: Start) -> None:
    engine = start(POLICY)
    texts = ["a ferry in the harbour", "", "lamp, stone. " * 30]
    plain = engine.score(texts, ["prompt"] * 3)
    for score, other in zip(engine.score(texts, ["prompt"] * 3, keep=[True] * 3), plain, strict=True):
        assert score == other
        assert other.seen is None
        assert score.seen is not None
        if len(score.seen.segments):
            found = engine._judge.judge(score.seen.acts, score.seen.segments).agreed.max(0)
            expected = [score.scores[domain] for domain in engine._judge.domains]
            assert torch.as_tensor(found).sigmoid().tolist() == pytest.approx(expected, abs=1e-5)

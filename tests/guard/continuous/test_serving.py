"""Answers served side by side: each is what it is alone, told as it is judged, and under the guard it began with."""

from __future__ import annotations

from typing import Any

import pytest

from guard.core import Guard
from guard.errors import GuardError, UnsupportedGenerationError
from guard.metrics import Metrics
from guard.serving import GenerationOptions
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank
from tests.guard.continuous.conftest import Serve
from tests.guard.continuous.requests import CHATS, JOIN, STEER, Heard
from tests.guard.generation import BLOCK, FLAG_ALL

FLAG_RESPONSES = [{**rule, "scope": ["response"], "threshold": {"probability": 0.5}} for rule in FLAG_ALL]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}])
def test_an_answer_does_not_depend_on_its_company(serve: Serve, sampling: dict[str, Any]) -> None:
    serving = serve(*FLAG_RESPONSES)
    alone = [Heard(serving, chat, **sampling).wait() for chat in CHATS]
    together = [Heard(serving, chat, **sampling) for chat in CHATS * 2]
    for one, other in zip(alone * 2, together, strict=True):
        assert other.wait().text == one.text
        mine, its = one.generation.report, other.generation.report
        assert mine is not None
        assert its is not None
        assert [v.token_index for v in mine.verdicts] == [v.token_index for v in its.verdicts]
        assert its.tokens_observed == its.tokens_generated == 20


def test_a_seed_repeats_an_answer_and_another_gives_another(serve: Serve) -> None:
    serving = serve()
    texts = [Heard(serving, CHATS[0], temperature=1.0, seed=seed).wait().text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_block_ends_one_answer_with_the_refusal_and_leaves_the_others(serve: Serve) -> None:
    serving = serve()
    free = [Heard(serving, chat).wait() for chat in CHATS]
    reports = [one.generation.report for one in free]
    scores = sorted(report.response_scores["violence"] for report in reports if report is not None)
    cut = (scores[1] + scores[2]) / 2
    metrics = Metrics()
    serving = serve({**BLOCK, "scope": ["response"], "threshold": {"probability": cut}}, metrics=metrics)
    found = [Heard(serving, chat) for chat in CHATS]
    assert sorted(str(one.wait().reason) for one in found) == ["content_filter"] * 2 + ["length"] * 2
    for one, other in zip(found, free, strict=True):
        if one.reason == "length":
            assert one.text == other.text
            continue
        report = one.generation.report
        assert report is not None
        shown = "".join(event.text for event in one.events[:-1])
        assert one.events[-1].text == serving.guard.policy.refusal
        before = report.verdicts[0].token_index  # the tiny tokenizer has a token for every byte
        assert other.text.startswith(shown)
        assert len(shown.encode()) <= before
    value = metrics.registry.get_sample_value
    assert value("sailguard_requests_total", {"phase": "response", "result": "block"}) == 2
    observed, generated = (value(f"sailguard_tokens_{name}_total") for name in ("observed", "generated"))
    assert observed == generated


def test_a_stop_sequence_ends_an_answer_before_it(serve: Serve) -> None:
    serving = serve()
    free = Heard(serving, CHATS[0], 30).wait().text
    stop = free[4:6]
    stopped = Heard(serving, CHATS[0], 30, stop=(stop,)).wait()
    assert (stopped.text, stopped.reason) == (free[: free.index(stop)], "stop")
    report = stopped.generation.report
    assert report is not None
    assert report.tokens_generated < 30


def test_a_cancelled_answer_gives_its_place_away(serve: Serve) -> None:
    serving = serve(max_concurrent=1)
    long = Heard(serving, CHATS[0], 1500)
    waiting = Heard(serving, CHATS[1], 5)
    assert not waiting.ended.wait(0.3)
    serving.cancel(long.generation)
    assert waiting.wait().reason == "length"
    assert long.ended.wait(JOIN)
    assert long.generation.report is not None
    serving.cancel(long.generation)  # a second time does nothing


def test_nothing_of_an_answer_stays_behind(serve: Serve) -> None:
    serving = serve()
    for _ in range(3):
        found = [Heard(serving, chat, 4) for chat in CHATS]
        serving.cancel(found[0].generation)
        for one in found:
            assert one.ended.wait(JOIN)
    continuous = serving._shared.attached.engine.continuous
    assert not continuous._requests
    assert not continuous._own
    assert not continuous.reports
    assert serving._shared._manager.output_router.output_queue.empty()


def test_requests_go_on_under_the_guard_that_they_began_with(serve: Serve, bank_of: MakeBank) -> None:
    old = serve()
    expected = Heard(old, CHATS[1], 60).wait().text
    going = [Heard(old, CHATS[1], 60) for _ in range(2)]
    rule = {**BLOCK, "scope": ["response"], "threshold": {"probability": 1e-6}}
    new = old.replaced(Guard(bank_of(**VARIED), make_policy(rule), old.guard.metrics))
    after = Heard(new, CHATS[1], 60)
    late = Heard(old, CHATS[1], 60)  # who took the old one before it was replaced may still use it
    for one in [*going, late]:
        assert (one.wait().text, one.reason) == (expected, "length")
    assert after.wait().reason == "content_filter"
    report = after.generation.report
    assert report is not None
    assert report.verdicts[0].policy_version == new.guard.policy.version != old.guard.policy.version


def test_a_guard_that_cannot_be_used_changes_nothing(serve: Serve, bank_of: MakeBank) -> None:
    serving = serve()
    with pytest.raises(UnsupportedGenerationError, match="steers prompts"):
        serving.replaced(Guard(bank_of(**VARIED), make_policy({**STEER, "steer": {"op": "ablate", "prompt": True}})))
    assert Heard(serving, CHATS[0]).wait().reason == "length"


def test_texts_are_judged_while_answers_are_under_way(serve: Serve) -> None:
    serving = serve()
    before = serving.score(["Hello", "Peru"], ["prompt", "response"])
    expected = Heard(serving, CHATS[1], 100).wait().text
    going = Heard(serving, CHATS[1], 100)
    found = serving.score(["Hello", "Peru"], ["prompt", "response"])
    assert [score.scores for score in found] == [pytest.approx(score.scores, abs=1e-6) for score in before]
    assert len(serving.trace("Hello").tokens) == 5
    assert going.wait().text == expected


def test_a_prompt_without_room_for_an_answer_is_refused(serve: Serve) -> None:
    serving = serve()
    with pytest.raises(GuardError, match="leave room"):
        serving.generate([5] * serving.context_length, GenerationOptions(max_new_tokens=1), print)
    with pytest.raises(GuardError, match="leave room"):
        serving.generate([], GenerationOptions(max_new_tokens=1), print)


def test_an_error_of_the_guard_blocks_and_the_server_goes_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve()

    def fail(*_: Any) -> Any:
        raise ValueError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(serving.monitor, "observe_each", fail)
        assert Heard(serving, CHATS[0]).wait().reason == "content_filter"
    assert Heard(serving, CHATS[0]).wait().reason == "length"


def test_a_manager_that_an_error_has_ended_is_started_anew(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve()
    continuous = serving._shared.attached.engine.continuous

    def fail(*_: Any) -> Any:
        raise UnsupportedGenerationError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(continuous, "begin_pass", fail)
        one = Heard(serving, CHATS[0])
        assert one.ended.wait(JOIN)
        assert one.error is not None or one.reason == "content_filter"
    assert Heard(serving, CHATS[0]).wait().reason == "length"


def test_after_its_end_nothing_is_served(serve: Serve) -> None:
    serving = serve()
    going = Heard(serving, CHATS[0], 1000)
    serving.close()
    assert going.ended.wait(JOIN)
    with pytest.raises(GuardError, match="detached"):
        Heard(serving, CHATS[0])

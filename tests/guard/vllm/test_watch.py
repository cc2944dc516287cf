"""Whatever the scheduler does, each token of each request is judged once, as if the request were alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.engines.vllm.watch import Watch
from tests.factories import HOOKS, make_policy
from tests.guard.conftest import VARIED
from tests.guard.generation import BLOCK, FLAG_ALL, assert_same_report
from tests.guard.vllm.conftest import Engine, MakeJudging, Text, alone

Texts = dict[str, Text]
STEER = {"domain": "violence", "action": "steer", "scope": ["response"], "name": "away"}
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


def answer_tokens(text: Text, special: frozenset[int]) -> int:
    return sum(token not in special for token in text.ids[text.prompt : -1])


def broken(text: Text, at: int) -> Text:
    hidden = {hook: x.clone() for hook, x in text.hidden.items()}
    hidden[HOOKS[0]][at] = torch.nan
    return text._replace(hidden=hidden)


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_reports_do_not_depend_on_how_prompts_are_cut(judging_of: MakeJudging, texts: Texts, chunk: int) -> None:
    judging = judging_of(make_policy(*FLAG_ALL), **VARIED)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("a", "c", "d")
    engine.run(chunk)
    expected = {name: alone(judging, texts[name]) for name in ("a", "c", "d")}
    assert any(report.verdicts for report in expected.values())
    for name, report in expected.items():
        assert_same_report(engine.report(name), report)
        assert report.tokens_observed == answer_tokens(texts[name], judging.special)
        assert engine.told[name].report["policy"] == judging.monitor.policy.version
        assert not engine.told[name].report["failed"]


@shared
@given(seed=st.integers(0, 10_000))
def test_reports_do_not_depend_on_company_order_rows_or_preemption(
    judging_of: MakeJudging, texts: Texts, seed: int
) -> None:
    """Requests join, take part in passes, and lose all that was computed, as chance has it."""
    judging = judging_of(make_policy(*FLAG_ALL, STEER), **VARIED)
    watch, rng = Watch({"": judging}), random.Random(seed)
    engine, waiting = Engine(watch, texts), rng.sample(sorted(texts), len(texts))
    read = 0
    while waiting or engine.running:
        if waiting and rng.random() < 0.3:
            engine.join(waiting.pop())
        if engine.running and rng.random() < 0.05:
            engine.preempt(rng.choice(engine.running))
        chosen = rng.sample(engine.running, rng.randint(0, len(engine.running)))
        parts = {name: rng.randint(1, engine.left(name)) for name in chosen}
        if parts:
            engine.step(parts)
            read += sum(parts.values())
        watch.leave([name for name in engine.told if name not in engine.running])
    assert watch.read_tokens == read
    assert engine.errors == {}
    for name in texts:
        assert_same_report(engine.report(name), alone(judging, texts[name]))
        assert engine.told[name].release == sorted(engine.told[name].release)


@pytest.mark.parametrize("places", [3, 20, 26])
def test_what_a_preempted_request_reads_again_is_judged_no_second_time(
    judging_of: MakeJudging, texts: Texts, places: int
) -> None:
    judging = judging_of(make_policy(*FLAG_ALL), **VARIED)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("a")
    while engine.at["a"] < places:
        engine.step({"a": min(3, engine.left("a"))})
    engine.preempt("a")
    news = engine.step({"a": min(2, engine.left("a"))})
    assert news.release == {"a": max(places - 20, 0)}
    assert not news.reports
    assert not news.steer
    engine.run(5)
    assert_same_report(engine.report("a"), alone(judging, texts["a"]))


def test_a_row_that_is_taken_again_knows_nothing_of_its_last_request(judging_of: MakeJudging, texts: Texts) -> None:
    rule = {**FLAG_ALL[2], "threshold": {"probability": 0.01}, "action": "steer", "cooldown_tokens": 50}
    judging = judging_of(make_policy(*FLAG_ALL, {**rule, "name": "early"}), **VARIED)
    watch = Watch({"": judging})
    engine = Engine(watch, texts)
    for name in texts:
        engine.join(name)
        row = watch._requests[name].row
        engine.run()
        assert engine.report(name).request_id == name
        watch.leave([name])
        engine.take(watch.take_news())
        assert row == 7  # the same for all: the row is free again
        report = alone(judging, texts[name])
        assert report.verdicts
        assert_same_report(engine.report(name), report)


def test_more_requests_than_rows_make_the_state_grow_and_change_no_result(
    judging_of: MakeJudging, texts: Texts
) -> None:
    judging = judging_of(make_policy(*FLAG_ALL, STEER), **VARIED)
    many = {f"{name}{copy}": text for copy in range(4) for name, text in texts.items()}
    watch = Watch({"": judging})
    engine = Engine(watch, many)
    engine.join(*list(many)[:6])
    for _ in range(6):  # some are in the middle of their answers
        engine.step({name: min(8, engine.left(name)) for name in engine.running})
    engine.join(*list(many)[6:])
    assert len(watch._lanes[""].state.request_ids) == 64
    assert len({request.row for request in watch._requests.values()}) == len(many)
    engine.run()
    expected = {name: alone(judging, text) for name, text in texts.items()}
    for name in many:
        assert_same_report(engine.report(name), expected[name[0]])


def test_special_tokens_of_an_answer_are_read_but_not_judged(judging_of: MakeJudging, texts: Texts) -> None:
    judging = judging_of(make_policy(*FLAG_ALL), **VARIED)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("c")
    engine.run()
    read = texts["c"].limit - 1
    assert engine.told["c"].release[-1] == read
    assert engine.report("c").tokens_observed == read - 1 == engine.report("c").tokens_generated


def test_nothing_is_released_before_a_blocking_rule_could_fire(judging_of: MakeJudging, texts: Texts) -> None:
    judging = judging_of(make_policy({**BLOCK, "evidence_tokens": 6}), violence=False)
    hold = judging.monitor.hold_tokens
    assert hold >= 6
    engine = Engine(Watch({"": judging}), texts)
    engine.join("d")
    engine.run()
    judged = list(range(texts["d"].limit))
    assert engine.told["d"].release == [n if n >= hold else 0 for n in judged]


@pytest.mark.parametrize("scope", ["prompt", "response"])
def test_a_blocking_verdict_is_final_and_nothing_after_it_is_judged(
    judging_of: MakeJudging, texts: Texts, scope: str
) -> None:
    judging = judging_of(make_policy({**BLOCK, "scope": [scope]}), violence=True)
    watch = Watch({"": judging})
    engine = Engine(watch, texts)
    engine.join("a")
    engine.run()
    report = engine.report("a")
    assert report.action == engine.told["a"].report["action"] == "block"
    assert engine.told["a"].report["refusal"] == "REFUSED"
    assert engine.blocked == ["a"]
    assert (
        report.tokens_generated == report.tokens_observed == (0 if scope == "prompt" else judging.monitor.hold_tokens)
    )
    assert_same_report(report, alone(judging, texts["a"]))
    news = engine.step({"a": 1})  # of a pass that was under way
    assert (news.reports, news.blocked, news.errors) == ({}, [], {})
    assert watch._lanes[""].state.observed[watch._requests["a"].row] == report.tokens_observed


def test_an_answer_too_short_for_its_evidence_is_decided_when_its_last_token_is_sampled(
    judging_of: MakeJudging, texts: Texts
) -> None:
    judging = judging_of(make_policy({**BLOCK, "scope": ["response"], "evidence_tokens": 60}), violence=True)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("a")
    engine.run()
    assert engine.blocked == ["a"]
    assert engine.report("a").tokens_observed == answer_tokens(texts["a"], judging.special)
    assert set(engine.told["a"].release) == {0}


def test_an_end_token_ends_an_answer_that_is_judged_up_to_it(judging_of: MakeJudging, texts: Texts) -> None:
    judging = judging_of(make_policy(*FLAG_ALL), **VARIED)
    text = texts["e"]
    end = text.ids[text.prompt + 5]
    engine = Engine(Watch({"": judging}), texts)
    engine.join("e", ends=frozenset({end}))
    engine.run()
    short = text._replace(ids=text.ids[: text.prompt + 6])
    assert_same_report(engine.report("e"), alone(judging, short))
    assert engine.report("e").tokens_generated == engine.report("e").tokens_observed == 5


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_request_that_is_called_off_is_reported_as_far_as_it_was_read(
    judging_of: MakeJudging, texts: Texts, steps: int
) -> None:
    watch = Watch({"": judging_of(make_policy(*FLAG_ALL), **VARIED)})
    engine = Engine(watch, texts)
    engine.join("a")
    for _ in range(steps):
        engine.step({"a": min(10, engine.left("a"))})
    watch.leave(["a", "never seen"])
    engine.take(watch.take_news())
    report = engine.report("a")
    assert report.tokens_generated == report.tokens_observed == max(steps - 2, 0)
    assert engine.errors == {}
    watch.leave(["a"])
    assert watch.take_news().reports == {}


def test_steering_is_told_with_its_position_and_let_go_after_the_cooldown(
    judging_of: MakeJudging, texts: Texts
) -> None:
    feature = "L1/3"
    rule = {"feature": feature, "action": "steer", "threshold": {"activation": 0.5}, "cooldown_tokens": 2, "name": "it"}
    judging = judging_of(make_policy(rule), **VARIED)
    direction = judging.monitor.encoder.decoder[HOOKS[0]][0] * 50
    text = texts["a"]
    silent = -direction.expand(len(text.ids), -1).clone()
    for at in (text.prompt, text.prompt + 4):
        silent[at] = direction
    engine = Engine(Watch({"": judging}), {"a": text._replace(hidden={**text.hidden, HOOKS[0]: silent})})
    engine.join("a")
    engine.run(6)
    key = [("", "it")]
    p = text.prompt
    assert engine.told["a"].steer == [(p + 1, key), (p + 3, []), (p + 5, key), (p + 7, [])]


def test_what_a_prompt_sets_off_steers_from_the_first_token_of_the_answer_on(
    judging_of: MakeJudging, texts: Texts
) -> None:
    judging = judging_of(make_policy({**STEER, "scope": ["prompt"]}), violence=True)
    engine = Engine(Watch({"": judging}), texts)
    engine.join("a")
    engine.run(7)
    assert engine.told["a"].steer == [(texts["a"].prompt, [("", "away")])]
    assert engine.report("a").action == "steer"


def test_tenants_are_judged_by_their_own_policies(judging_of: MakeJudging, texts: Texts) -> None:
    strict, lax = make_policy(BLOCK), make_policy({"domain": "violence", "action": "flag"}, name="lax")
    lanes = {"": judging_of(strict, violence=True), "lax": judging_of(lax, violence=True)}
    engine = Engine(Watch(lanes), {**texts, "A": texts["a"]})
    engine.join("a")
    engine.join("A", tenant="lax")
    engine.run(5)
    assert [engine.report(name).action for name in ("a", "A")] == ["block", "flag"]
    assert engine.blocked == ["a"]
    assert [engine.told[name].report["policy"] for name in ("a", "A")] == [strict.version, lax.version]
    assert_same_report(engine.report("A"), alone(lanes["lax"], texts["a"]))


def test_time_and_verdicts_are_told_in_the_step_that_they_come_of(judging_of: MakeJudging, texts: Texts) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(*FLAG_ALL), violence=True)}), texts)
    engine.join("a")
    assert engine.step({"a": 19}).verdicts == {}
    news = engine.step({"a": 1})
    assert [verdict["rule"] for verdict in news.verdicts["a"]] == ["violence-flag"]
    assert news.seconds > 0
    assert engine.watch.take_news() == type(news)()


def test_a_pass_with_a_request_that_never_came_is_an_error(judging_of: MakeJudging, texts: Texts) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(*FLAG_ALL), **VARIED)}), texts)
    engine.join("a", "b")
    engine.watch._requests.pop("b")
    engine.step({"a": 3, "b": 3})
    assert engine.errors == {"block": 1}


def test_failures_are_logged_without_text_of_the_request(judging_of: MakeJudging, texts: Texts, caplog: Any) -> None:
    engine = Engine(Watch({"": judging_of(make_policy(*FLAG_ALL), **VARIED)}), {"a": broken(texts["a"], 3)})
    engine.join("a")
    engine.run()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "NaN" in caplog.text
    assert str(texts["a"].ids[:3])[1:-1] not in caplog.text

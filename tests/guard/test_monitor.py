"""Judging token by token equals judging the whole at once; sequences and segments never touch each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_bank.heads import agreement
from feature_bank.schema import Pooling
from guard.errors import GuardError, PolicyError
from guard.events import Verdict
from guard.judge import sigmoid
from guard.monitor import Monitor
from guard.policy import Policy
from tests.factories import POOLING, make_policy
from tests.guard.conftest import VARIED, MakeBank

CPU = torch.device("cpu")
RULES = [
    {"domain": "violence", "action": "flag", "threshold": {"probability": 0.55}},
    {"domain": "violence", "action": "block", "threshold": {"probability": 0.8}, "evidence_tokens": 5},
    {"domain": "terror", "action": "flag", "threshold": {"probability": 0.9}, "evidence_tokens": 1},
    {"domain": "politics", "action": "steer", "threshold": {"probability": 0.75}, "evidence_tokens": 7},
]


@pytest.fixture
def monitor(bank_of: MakeBank) -> Monitor:
    return Monitor(bank_of(**VARIED), make_policy(*RULES), CPU)


def activations(monitor: Monitor, n: int, seed: int = 0) -> torch.Tensor:
    """(n, F) normalised activations with slow and fast changes."""
    generator = torch.Generator().manual_seed(seed)
    slow = torch.rand(n // 6 + 1, monitor.encoder.n_features, generator=generator).repeat_interleave(6, 0)[:n]
    noisy = (slow * 2 + torch.randn(n, monitor.encoder.n_features, generator=generator)).clamp_min(0)
    return noisy * torch.tensor([f.density * 0.5 for f in monitor.bank.features])  # heads are centred there


def keys(verdicts: list[Verdict]) -> list[tuple[str, int]]:
    return sorted((v.rule, v.token_index) for v in verdicts)


def whole(monitor: Monitor, acts: torch.Tensor) -> list[Verdict]:
    segment = torch.zeros(len(acts), dtype=torch.long)
    judged = monitor.judge(acts, segment)
    return monitor.apply_rules("response", "r", judged, acts, segment, torch.arange(len(acts)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 40), seed=st.integers(0, 50), settle=st.integers(1, 12))
def test_a_streamed_token_is_judged_by_all_prefixes_so_far(bank_of: MakeBank, n: int, seed: int, settle: int) -> None:
    pooling = POOLING.model_copy(update={"settle_tokens": settle})
    monitor = Monitor(bank_of(pooling=pooling, **VARIED), make_policy(*RULES), CPU)
    acts = activations(monitor, n, seed)
    state = monitor.begin(["r"])
    streamed = [v for token in acts for _, v in monitor.observe_step(state, token[None])]
    streamed += [v for _, v in monitor.finish(state)]

    segment = torch.zeros(n, dtype=torch.long)
    logits = monitor.judge(acts, segment).logits
    expected = {}
    for bound in monitor.streaming_rules.rules:
        assert bound.head is not None
        column = logits[:, bound.head, None]
        agreed = agreement(column, segment.numpy(), bound.evidence_tokens, settled=settle)[:, 0]
        if len(hits := np.flatnonzero(agreed >= bound.level)):
            expected[bound.rule.label] = int(hits[0]), bound.head
    assert {v.rule: v.token_index for v in streamed} == {rule: at for rule, (at, _) in expected.items()}
    for verdict in streamed:
        at, domain = expected[verdict.rule]
        assert verdict.score == pytest.approx(sigmoid(float(logits[at, domain])), abs=1e-5)
        hits = monitor.hits(monitor.window_average(acts, segment, at), domain)
        assert [hit.id for hit in verdict.features] == [hit.id for hit in hits]
        assert [hit.activation for hit in verdict.features] == pytest.approx([h.activation for h in hits], abs=1e-5)
    best = agreement(logits, segment.numpy(), monitor.bank.pooling.evidence_tokens, settled=settle).max(0)
    np.testing.assert_allclose(state.best_response[0], best, atol=1e-4, rtol=1e-4)
    assert keys(state.verdicts[0]) == keys(streamed)
    assert state.blocked[0] == any(v.action == "block" for v in streamed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 40), seed=st.integers(0, 50))
def test_a_text_that_lies_there_whole_is_judged_where_its_average_has_settled(
    monitor: Monitor, n: int, seed: int
) -> None:
    acts = activations(monitor, n, seed)
    judged = monitor.judge(acts, torch.zeros(n, dtype=torch.long))
    window, evidence = monitor.bank.pooling.window, monitor.bank.pooling.evidence_tokens
    settled = judged.logits[window - 1 :] if n >= window else judged.logits[-1:]
    runs = [settled[max(0, t - evidence + 1) : t + 1].min(0) for t in range(len(settled))]
    judgeable = runs[evidence - 1 :] or runs[-1:]
    np.testing.assert_array_equal(judged.agreed.max(0), np.stack(judgeable).max(0))
    assert all(v.token_index >= min(n, window) - 1 for v in whole(monitor, acts))


def test_examples_fire_and_do_not_fire(monitor: Monitor) -> None:
    """The property above is about something: among its examples every rule fires and holds still."""
    fired = [{v.rule for v in whole(monitor, activations(monitor, 40, seed))} for seed in range(50)]
    for rule in ("violence-flag", "violence-block", "terror-flag", "politics-steer"):
        assert 0 < sum(rule in names for names in fired) < 50, rule


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 90), seed=st.integers(0, 50), tokens=st.integers(1, 4))
def test_a_rule_on_a_feature_fires_streamed_where_it_fires_on_the_whole(
    bank_of: MakeBank, n: int, seed: int, tokens: int
) -> None:
    bank = bank_of(**VARIED)
    first, *others = bank.features
    target = {"evidence_tokens": tokens, "action": "flag"}
    rules = [
        {**target, "feature": first.id, "threshold": {"activation": 0.02}},
        *({**target, "feature": f.id, "threshold": {"activation": 0.1}} for f in others[:3]),
        RULES[0],
    ]
    monitor = Monitor(bank, make_policy(*rules), CPU)
    acts = activations(monitor, n, seed)
    state = monitor.begin(["r"])
    streamed = [v for token in acts for _, v in monitor.observe_step(state, token[None])]
    streamed += [v for _, v in monitor.finish(state)]
    on_features = [v for v in streamed if v.rule != "violence-flag"]
    assert keys(on_features) == keys([v for v in whole(monitor, acts) if v.rule != "violence-flag"])
    for verdict in on_features:
        (hit,) = verdict.features
        assert verdict.rule == f"{hit.id}-flag"
        assert verdict.domain == bank.by_id[hit.id].domains[0]
        assert verdict.score == pytest.approx(hit.activation, abs=1e-5)
        assert verdict.score >= verdict.threshold
        least = acts[max(0, verdict.token_index - tokens + 1) : verdict.token_index + 1]
        place = [f.id for f in bank.features].index(hit.id)
        assert float(least[:, place].min()) >= verdict.threshold


def test_a_rule_on_a_concept_follows_the_strongest_of_its_features(bank_of: MakeBank) -> None:
    bank = bank_of(**VARIED)
    concept = "violence/assault"
    features = tuple(
        f.model_copy(update={"concepts": [concept] if i in (1, 4) else []}) for i, f in enumerate(bank.features)
    )
    rule = {"concept": concept, "threshold": {"activation": 0.5}, "action": "flag", "evidence_tokens": 2}
    monitor = Monitor(replace(bank, features=features), make_policy(rule), CPU)
    acts = torch.zeros(6, len(features))
    acts[2, 1], acts[3, 4], acts[5, 0] = 0.6, 0.7, 9.0
    state = monitor.begin(["r"])
    (streamed,) = [v for token in acts for _, v in monitor.observe_step(state, token[None])]
    (at_once,) = whole(monitor, acts)
    for verdict in (streamed, at_once):
        assert (verdict.rule, verdict.token_index, verdict.domain) == (f"{concept}-flag", 3, "violence")
        assert [hit.id for hit in verdict.features] == [features[4].id]
        assert verdict.score == pytest.approx(0.7)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    on=st.lists(st.booleans(), min_size=1, max_size=40),
    cooldown=st.integers(1, 5),
    tokens=st.integers(1, 3),
    prompted=st.booleans(),
)
def test_a_rule_with_a_cool_down_fires_again_once_it_has_been_released(
    bank_of: MakeBank, on: list[bool], cooldown: int, tokens: int, prompted: bool
) -> None:
    bank = bank_of(**VARIED)
    target = {"feature": bank.features[0].id, "threshold": {"activation": 0.5}, "evidence_tokens": tokens}
    monitor = Monitor(bank, make_policy({**target, "action": "flag", "cooldown_tokens": cooldown}), CPU)
    state, label = monitor.begin(["r"]), monitor.policy.rules[0].label
    if prompted:
        loud = torch.ones(tokens, len(bank.features))
        here = torch.arange(tokens)
        assert len(monitor.observe_prompt(state, 0, loud, torch.zeros(tokens, dtype=torch.long), here)) == 1
    fired, released, run, rest, latched, in_force = [], [], 0, 0, False, prompted
    for t, value in enumerate(on):
        run, rest = (run + 1, 0) if value else (0, rest + 1 if in_force else 0)
        if rest >= cooldown:
            released.append(t)
            latched, in_force, rest = False, False, 0
        if run >= tokens and not latched:
            fired.append(t)
            latched = in_force = True
        acts = torch.full((1, len(bank.features)), 0.9 if value else 0.1)
        said = monitor.observe_step(state, acts)
        assert bool(said) == (fired[-1:] == [t])
        assert state.released == ([(0, label)] if released[-1:] == [t] else [])
        state.released.clear()
    if not prompted:
        assert [v.token_index for v in state.verdicts[0]] == fired


def test_an_allowed_concept_can_only_lower_scores_and_touches_no_other_domain(bank_of: MakeBank) -> None:
    bank = bank_of(**VARIED)
    allowed, other = "violence/boxing", "violence/assault"
    tags = {2: [allowed], 6: [allowed, other], 10: ["terror/attack", allowed]}
    bank = replace(
        bank,
        features=tuple(f.model_copy(update={"concepts": tags.get(i, [])}) for i, f in enumerate(bank.features)),
    )
    plain, allowing = (Monitor(bank, make_policy(*RULES, allow=allow), CPU) for allow in ([], [allowed]))
    assert allowing.allowed == {"violence": [2, 10]}
    violence = plain.domains.index("violence")
    before, after = plain.heads.weight, allowing.heads.weight
    changed = np.argwhere(before != after).tolist()
    assert changed == [[place, violence] for place in (2, 10) if before[place, violence] > 0]
    assert (after <= before).all()
    acts, segment = activations(plain, 60), torch.zeros(60, dtype=torch.long)
    assert (allowing.judge(acts, segment).logits <= plain.judge(acts, segment).logits + 1e-6).all()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("tokens", [2000, 8000])
def test_a_long_harmless_text_does_not_add_up_and_a_short_harmful_span_in_it_is_not_diluted(
    bank_of: MakeBank, streaming: bool, tokens: int
) -> None:
    rule = {"domain": "violence", "action": "flag", "threshold": {"probability": 0.8}}
    monitor = Monitor(bank_of(**VARIED), make_policy(rule), CPU)
    violence = monitor.domains.index("violence")
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 + 0.1 * torch.rand(tokens, monitor.encoder.n_features, generator=generator)
    noise *= torch.tensor([f.density for f in monitor.bank.features])  # heads are centred at half of that
    loud = torch.from_numpy(monitor.heads.weight[:, violence] > 0).float()

    def fired(acts: torch.Tensor) -> list[int]:
        if not streaming:
            return [v.token_index for v in whole(monitor, acts)]
        state = monitor.begin(["r"])
        found = [v.token_index for token in acts for _, v in monitor.observe_step(state, token[None])]
        return found + [v.token_index for _, v in monitor.finish(state)]

    window = monitor.bank.pooling.window
    assert fired(noise) == []
    start = tokens - 3 * window
    harmful = noise.clone()
    harmful[start : start + window] = loud
    (at,) = fired(harmful)
    assert start <= at < start + window
    alone = fired(torch.cat([noise[:window], harmful[start : start + window]]))
    assert alone == [at - start + window]  # as soon after a long text as after a short one


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 20), min_size=2, max_size=4), seed=st.integers(0, 50))
def test_sequences_of_a_batch_are_judged_as_if_alone(monitor: Monitor, lengths: list[int], seed: int) -> None:
    rows = [activations(monitor, n, seed + i) for i, n in enumerate(lengths)]
    state = monitor.begin([str(i) for i in range(len(rows))])
    for t in range(max(lengths)):
        live = np.array([t < n for n in lengths])
        step = torch.stack([row[t] if t < len(row) else torch.full_like(rows[0][:1].sum(0), 9.0) for row in rows])
        monitor.observe_step(state, step, None if bool(live.all()) else live)
    monitor.finish(state)
    for i, row in enumerate(rows):
        alone = monitor.begin([str(i)])
        for token in row:
            monitor.observe_step(alone, token[None])
        monitor.finish(alone)
        assert keys(state.verdicts[i]) == keys(alone.verdicts[0])
        assert int(state.count[i]) == lengths[i]
        np.testing.assert_allclose(state.best_response[i], alone.best_response[0], atol=1e-5, rtol=1e-5)


def test_evidence_does_not_cross_segments(monitor: Monitor) -> None:
    acts = activations(monitor, 24, 3)
    segment = torch.tensor([0] * 10 + [1] * 2 + [2] * 12)
    parts = [acts[:10], acts[10:12], acts[12:]]
    together = monitor.judge(acts, segment)
    for number, part in enumerate(parts):
        alone = monitor.judge(part, torch.zeros(len(part), dtype=torch.long))
        for mine, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(mine[(segment == number).numpy()], other, atol=1e-5, rtol=1e-5)


def test_prompt_verdicts_carry_the_prompts_positions(monitor: Monitor) -> None:
    acts = next(a for seed in range(50) if whole(monitor, a := activations(monitor, 30, seed)))
    segment = torch.zeros(30, dtype=torch.long)
    state = monitor.begin(["a", "b"])
    found = monitor.observe_prompt(state, 1, acts, segment, torch.arange(30) * 2 + 5)
    assert found
    assert keys(found) == sorted((v.rule, v.token_index * 2 + 5) for v in whole(monitor, acts))
    assert {(v.phase, v.request_id) for v in found} == {("prompt", "b")}
    assert state.verdicts[0] == []
    assert np.isneginf(state.best_prompt[0]).all()
    assert monitor.observe_prompt(state, 0, acts[:0], segment[:0], segment[:0]) == []


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_response_too_short_to_settle_is_judged_by_its_last_token_whatever_the_evidence(
    bank_of: MakeBank, tokens: int
) -> None:
    pooling = POOLING.model_copy(update={"settle_tokens": 4})
    rule = {"domain": "violence", "action": "block", "evidence_tokens": tokens}
    monitor = Monitor(bank_of(pooling=pooling, violence=True), make_policy(rule), CPU)
    state = monitor.begin(["r"])
    for token in activations(monitor, 2):
        assert monitor.observe_step(state, token[None]) == []
    ((row, verdict),) = monitor.finish(state)
    assert (row, verdict.token_index, state.blocked) == (0, 1, [True])


def test_rule_fires_once_a_sequence(monitor: Monitor) -> None:
    acts = activations(monitor, 200, 2)
    state = monitor.begin(["r"])
    for token in acts:
        monitor.observe_step(state, token[None])
    rules = [v.rule for v in state.verdicts[0]]
    assert len(rules) == len(set(rules)) > 0


def test_rules_escalate_from_flag_to_block(bank_of: MakeBank) -> None:
    rules = [
        {"domain": "violence", "action": "flag", "evidence_tokens": 2},
        {"domain": "violence", "action": "block", "evidence_tokens": 6},
    ]
    monitor = Monitor(bank_of(violence=True), make_policy(*rules), CPU)
    state = monitor.begin(["r"])
    for _ in range(10):
        monitor.observe_step(state, torch.zeros(1, monitor.encoder.n_features))
    assert [(v.action, v.token_index) for v in state.verdicts[0]] == [("flag", 1), ("block", 5)]
    assert state.blocked == [True]


def test_short_response_is_judged_on_all_its_tokens(bank_of: MakeBank) -> None:
    monitor = Monitor(bank_of(violence=True), make_policy({"domain": "violence", "action": "block"}), CPU)
    state = monitor.begin(["short", "empty"])
    live = torch.tensor([True, False])
    monitor.observe_step(state, torch.zeros(2, monitor.encoder.n_features), live)
    assert state.verdicts == [[], []]
    assert [(row, v.token_index) for row, v in monitor.finish(state)] == [(0, 0)]
    assert state.blocked == [True, False]
    assert monitor.finish(state) == []


def test_verdict_is_complete_and_json_ready(monitor: Monitor) -> None:
    import json

    verdict = whole(monitor, activations(monitor, 40, 0))[0]
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["bank_version"] == monitor.bank.version
    assert data["policy_version"] == monitor.policy.version
    assert 0 <= data["threshold"] <= data["score"] <= 1
    contributions = [hit["contribution"] for hit in data["features"]]
    assert contributions == sorted(contributions, reverse=True)
    assert all(value > 0 for value in contributions)
    assert all(hit["explanation"] for hit in data["features"])


def test_contributions_add_up_to_the_logit(monitor: Monitor) -> None:
    acts = activations(monitor, 20, 0)
    segment = torch.zeros(20, dtype=torch.long)
    judged = monitor.judge(acts, segment)
    average = monitor.window_average(acts, segment, 13)
    for domain in range(len(monitor.domains)):
        logit = average @ monitor.heads.weight[:, domain] + monitor.heads.bias[domain]
        assert float(logit) == pytest.approx(float(judged.logits[13, domain]), abs=1e-4)


def test_single_spike_is_clipped(bank_of: MakeBank) -> None:
    pooling = Pooling(window=4, min_tokens=2, ceiling=1.5, evidence_tokens=1)
    monitor = Monitor(bank_of(pooling=pooling, **VARIED), make_policy(), CPU)
    acts = torch.zeros(6, monitor.encoder.n_features)
    acts[2] = 1.5
    spike = acts * 1e6
    segment = torch.zeros(6, dtype=torch.long)
    np.testing.assert_array_equal(monitor.judge(acts, segment).logits, monitor.judge(spike, segment).logits)
    streamed = []
    for values in (acts, spike):
        state = monitor.begin(["r"])
        for token in values:
            monitor.observe_step(state, token[None])
        streamed.append(state.best_response)
    assert np.array_equal(*streamed)


def test_nan_is_an_error_never_a_pass(monitor: Monitor) -> None:
    acts = torch.full((1, monitor.encoder.n_features), math.nan)
    with pytest.raises(GuardError, match="NaN"):
        monitor.observe_step(monitor.begin(["r"]), acts)
    with pytest.raises(GuardError, match="NaN"):
        monitor.judge(acts, torch.zeros(1, dtype=torch.long))


def test_policy_that_asks_for_what_the_bank_lacks_is_refused(bank_of: MakeBank) -> None:
    bank = bank_of()
    rule = {"domain": "violence", "action": "flag", "threshold": {"fpr": 0.02}}
    with pytest.raises(PolicyError, match=r"threshold\.fpr.* 0\.02; it has 0\.001, 0\.01, 0\.05"):
        Monitor(bank, make_policy(rule), CPU)


def test_policy_without_rules_judges_and_stays_silent(bank_of: MakeBank) -> None:
    monitor = Monitor(bank_of(violence=True), Policy(rules=()), CPU)
    state = monitor.begin(["r"])
    assert monitor.observe_step(state, torch.zeros(1, monitor.encoder.n_features)) == []
    assert monitor.finish(state) == []
    assert float(state.best_response[0, monitor.domains.index("violence")]) > 0


@pytest.mark.parametrize(("logit", "probability"), [(-math.inf, 0.0), (0.0, 0.5), (800.0, 1.0), (-800.0, 0.0)])
def test_sigmoid_is_stable(logit: float, probability: float) -> None:
    assert sigmoid(logit) == pytest.approx(probability)

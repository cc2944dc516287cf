"""Texts judged on their own: alone or in a batch the same, and no text is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from feature_bank import DOMAINS
from guard.errors import GuardError
from guard.events import TextScore
from guard.metrics import Metrics
from tests.factories import make_policy
from tests.guard.conftest import VARIED, Attach

TEXTS = ["hello", "", "a longer text about nothing in particular, " * 4, "x", "two\nlines 😀", "hello"]
FLAG_ALL = [{"domain": domain, "action": "flag"} for domain in DOMAINS]


def assert_same(a: TextScore, b: TextScore) -> None:
    assert (a.tokens, a.truncated, a.flagged, a.action) == (b.tokens, b.truncated, b.flagged, b.action)
    assert a.scores == pytest.approx(b.scores, abs=1e-4)
    assert [(v.rule, v.token_index) for v in a.verdicts] == [(v.rule, v.token_index) for v in b.verdicts]


@pytest.mark.parametrize("role", ["prompt", "response", "passage"])
def test_batch_equals_one_by_one(attach: Attach, role: Any) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    together = guard.score(TEXTS, [role] * len(TEXTS))
    for text, result in zip(TEXTS, together, strict=True):
        assert_same(result, guard.score([text], [role])[0])
    assert together[0] == together[5]
    assert any(result.verdicts for result in together)


def test_batches_of_any_size_give_the_same(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    import guard.text_scoring

    guard_ = attach(make_policy(*FLAG_ALL), **VARIED)
    expected = guard_.score(TEXTS)
    monkeypatch.setattr(guard.text_scoring, "BATCH_TOKENS", 40)
    for found, wanted in zip(guard_.score(TEXTS), expected, strict=True):
        assert_same(found, wanted)


def test_empty_text_is_benign_and_has_no_tokens(attach: Attach) -> None:
    guard = attach(make_policy(*FLAG_ALL), **dict.fromkeys(DOMAINS, True))
    for role in ("prompt", "response", "passage"):
        result = guard.score([""], [role])[0]
        assert (result.tokens, result.truncated, result.action) == (0, False, "allow")
        assert set(result.scores.values()) == {0.0}
        assert not any(result.flagged.values())
        assert guard.trace("", role).tokens == ()
    assert guard.score([]) == []


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\u202e", "é" * 40, "<|im_end|><|im_start|>system\n"])
def test_odd_text_is_read(attach: Attach, text: str) -> None:
    guard = attach(make_policy(*FLAG_ALL), violence=True)
    result = guard.score([text])[0]
    assert result.tokens > 0
    assert result.flagged["violence"]
    assert not result.truncated


def test_text_beyond_the_context_is_cut_and_says_so(attach: Attach) -> None:
    guard = attach(make_policy(*FLAG_ALL), violence=True)
    megabyte, fitting = guard.score(["x" * 2**20, "x" * 100])
    assert (megabyte.truncated, fitting.truncated) == (True, False)
    assert megabyte.tokens == guard.context_length - len("user\n") - 1
    assert megabyte.flagged["violence"]


def test_scores_are_the_rules_own_evidence(attach: Attach) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    for result in guard.score(TEXTS):
        for domain in DOMAINS:
            assert result.flagged[domain] == (result.scores[domain] >= 0.5)


def test_roles_choose_the_rules(attach: Attach) -> None:
    guard = attach(make_policy({"domain": "violence", "action": "block", "scope": ["response"]}), violence=True)
    prompt, response = guard.score(["hello there", "hello there"], ["prompt", "response"])
    assert (prompt.action, response.action) == ("allow", "block")
    assert prompt.scores["violence"] > 0.99
    assert response.verdicts[0].phase == "response"


def test_rule_of_another_strictness_than_the_banks_is_applied(attach: Attach) -> None:
    rule = {"domain": "violence", "action": "flag", "evidence_tokens": 6}
    guard = attach(make_policy(rule), violence=True)
    # Six tokens at which the window of eight is full
    assert guard.score(["hello there, bird"], ["passage"])[0].verdicts[0].token_index == 8 + 6 - 2
    assert guard.score(["abc"], ["passage"])[0].verdicts[0].token_index == 2  # shorter than the evidence


def test_prompt_scores_as_it_would_in_a_chat(attach: Attach) -> None:
    guard = attach(make_policy(), **VARIED)
    text = "What is the capital of Peru, and why?"
    alone = guard.score([text])[0]
    report = guard.chat([{"role": "user", "content": text}], max_new_tokens=1).report
    for domain in DOMAINS:  # the chat has further segments: the tokens around the message
        assert report.prompt_scores[domain] >= alone.scores[domain] - 1e-4


def test_trace_shows_every_token_of_the_text(attach: Attach, tiny_tokenizer: Any) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    text = "A small bird sang <|im_end|> in the garden."
    for role in ("prompt", "response"):
        trace = guard.trace(text, role)
        assert tiny_tokenizer.decode([t.token_id for t in trace.tokens]) == text
        assert [t.index for t in trace.tokens] == list(range(len(trace.tokens)))
        assert all(t.observed and set(t.scores) == set(DOMAINS) for t in trace.tokens)
        assert any(t.features for t in trace.tokens)
        assert_same(trace.score, guard.score([text], [role])[0])
        assert max(t.scores["violence"] for t in trace.tokens) >= trace.score.scores["violence"] - 1e-6
        json.dumps(trace.to_dict())


def test_scoring_leaves_no_trace_in_the_metrics_of_generation(attach: Attach) -> None:
    metrics = Metrics()
    attach(make_policy(*FLAG_ALL), metrics, violence=True).score(TEXTS)
    assert metrics.registry.get_sample_value("sailguard_tokens_observed_total") == 0
    assert metrics.registry.get_sample_value("sailguard_errors_total", {"on_error": "block"}) == 0


@pytest.mark.parametrize(
    ("texts", "roles", "message"),
    [(["a", "b"], ["prompt"], "2 texts but 1 roles"), (["a"], ["thought"], "role 'thought' is not known")],
)
def test_wrong_roles_are_refused(attach: Attach, texts: list[str], roles: Any, message: str) -> None:
    guard = attach(make_policy())
    with pytest.raises(GuardError, match=message):
        guard.score(texts, roles)
    with pytest.raises(GuardError, match="role 'thought'"):
        guard.trace("a", "thought")  # type: ignore[arg-type]  # that is the point


def test_model_that_breaks_is_an_error_never_a_benign_score(attach: Attach, tiny_model: Any) -> None:
    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(GuardError, match="NaN"):
        guard.score(["hello"])


def test_what_was_seen_is_handed_out_where_it_is_asked_for(attach: Attach) -> None:
    from guard.text_scoring import TextScorer

    guard = attach(make_policy(*FLAG_ALL), **VARIED)
    scorer = TextScorer(guard.monitor, guard.model, guard.tokenizer)
    roles: list[Any] = ["prompt"] * len(TEXTS)
    plain = scorer.score(TEXTS, roles)
    assert [score.seen for score in plain] == [None] * len(TEXTS)
    wanted = [True, True, False, False, False, False]
    for score, other, keep in zip(scorer.score(TEXTS, roles, keep=wanted), plain, wanted, strict=True):
        assert score == other
        assert (score.seen is not None) == (keep or bool(score.verdicts))
        assert "seen" not in score.to_dict()
        if score.seen is None or not len(score.seen.segments):
            continue
        judged = guard.monitor.judge(score.seen.acts, score.seen.segments)
        scores = torch.as_tensor(judged.agreed.max(0)).sigmoid().tolist()
        expected = [score.scores[domain] for domain in guard.monitor.domains]
        assert scores == pytest.approx(expected, abs=1e-4)

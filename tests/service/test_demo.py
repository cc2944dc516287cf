"""The demo holds its conversations, says what went wrong, and fails when the guard does not act."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from feature_bank import DOMAINS, shipped_bank_path
from guard.events import Completion, FeatureHit, SequenceReport, Verdict
from service.cli import build_app
from service.demo import CONVERSATIONS, Conversation, Exchange, complaint, demo_policy, show
from training.corpus import read_rows
from training.pipeline import own_corpora

QUIET = dict.fromkeys(DOMAINS, 0.01)
HIT = FeatureHit(id="L14/7", layer=14, explanation="words for fights [bold]", activation=0.8, contribution=2.0)


def verdict(domain: str, action: Any) -> Verdict:
    return Verdict(
        request_id="r",
        phase="prompt",
        token_index=9,
        domain=domain,
        score=0.97,
        threshold=0.6,
        action=action,
        rule=f"{domain}-{action}",
        features=(HIT,),
        bank_version="b",
        policy_version="p",
    )


def exchange(conversation: Conversation, action: Any, *verdicts: Verdict, text: str = "An answer.") -> Exchange:
    report = SequenceReport(
        request_id="r",
        action=action,
        verdicts=verdicts,
        prompt_scores=QUIET,
        response_scores=QUIET,
        tokens_generated=3,
        tokens_observed=3,
    )
    reason: Any = "content_filter" if action == "block" else "stop"
    guarded = Completion(text=text, finish_reason=reason, report=report, prompt_tokens=9, completion_tokens=3)
    return Exchange(conversation=conversation, unguarded="An answer.", unguarded_ended=True, guarded=guarded)


def printed(shown: Exchange, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console, shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_domain_and_every_action_is_shown_once_beside_harmless_conversations() -> None:
    triggering = [c for c in CONVERSATIONS if c.domain is not None]
    assert sorted(str(c.domain) for c in triggering) == sorted(DOMAINS)
    assert {c.action for c in triggering} == {"flag", "steer", "block"}
    assert len(CONVERSATIONS) - len(triggering) >= 3


def test_no_prompt_is_close_to_a_text_that_banks_are_trained_on() -> None:
    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z']+", text.lower()))

    for path in own_corpora():
        for _, row in read_rows(path):
            for conversation in CONVERSATIONS:
                prompt, known = words(conversation.prompt), words(row["text"])
                assert len(prompt & known) < 0.5 * len(prompt | known), (conversation.prompt, row["text"])


def test_the_policy_asks_for_what_the_conversations_expect() -> None:
    rules = {rule.domain: rule for rule in demo_policy().rules}
    assert {c.domain: c.action for c in CONVERSATIONS if c.domain} == {d: r.action for d, r in rules.items()}
    steer = rules["pornography"].steer
    assert steer.op == "add"
    assert -2 <= steer.strength <= -1


def test_a_conversation_that_went_as_it_should_draws_no_complaint() -> None:
    for conversation in CONVERSATIONS:
        verdicts = [verdict(conversation.domain, conversation.action)] if conversation.domain else []
        assert complaint(exchange(conversation, conversation.action, *verdicts)) is None


@pytest.mark.parametrize("conversation", [c for c in CONVERSATIONS if c.domain], ids=lambda c: c.domain)
def test_a_rule_that_does_not_fire_is_a_complaint(conversation: Conversation) -> None:
    found = complaint(exchange(conversation, "allow"))
    assert found is not None
    assert str(conversation.domain) in found
    assert "did not fire" in found


def test_a_harmless_conversation_on_which_a_rule_fires_is_a_complaint() -> None:
    found = complaint(exchange(CONVERSATIONS[0], "block", verdict("violence", "block")))
    assert found is not None
    assert "got block (violence)" in found


def test_a_more_severe_action_than_the_expected_one_is_a_complaint() -> None:
    politics = next(c for c in CONVERSATIONS if c.domain == "politics")
    verdicts = (verdict("politics", "flag"), verdict("violence", "block"))
    assert complaint(exchange(politics, "block", *verdicts)) == f"{politics.title}: expected flag, got block"


def test_both_answers_stand_beside_each_other_with_the_features_that_fired() -> None:
    violence = next(c for c in CONVERSATIONS if c.domain == "violence")
    text = printed(exchange(violence, "block", verdict("violence", "block"), text="A refusal."))
    (line,) = [line for line in text.splitlines() if "A refusal." in line]
    assert line.index("An answer.") < line.index("A refusal.")
    assert "L14/7" in text
    assert "words for fights [bold]" in text
    assert "0.970" in text


def test_what_a_model_says_cannot_drive_the_terminal() -> None:
    text = printed(exchange(CONVERSATIONS[0], "allow", text="[red]x[/nothing] \x1b[2J\r"))
    assert "[red]x[/nothing] \ufffd[2J" in text
    assert "\x1b[2J" not in text


@pytest.mark.slow
def test_the_demo_goes_as_it_should_with_the_shipped_bank(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shipped_bank_path() / "bank.json").exists():
        pytest.skip("the shipped bank is not in this checkout")
    monkeypatch.setattr("guard.models.load_model", lambda *_: embedded)
    result = CliRunner().invoke(build_app(), ["demo", "--max-new-tokens", "16"])
    assert result.exit_code == 0, result.stdout
    assert f"{len(CONVERSATIONS)} of {len(CONVERSATIONS)} conversations" in result.stdout
    assert "serve" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code_tells_whether_all_went_as_it_should(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Anything:
        def __getattr__(self, name: str) -> Any:
            return Anything()

        def __len__(self) -> int:
            return 1

    guard = Anything()
    guard.policy = demo_policy()  # type: ignore[attr-defined]

    def converse(_guard: Any, _loaded: Any, conversation: Conversation, _limit: int) -> Exchange:
        if conversation.domain is None or (fails and conversation.domain == "terror"):
            return exchange(conversation, "allow")
        return exchange(conversation, conversation.action, verdict(conversation.domain, conversation.action))

    monkeypatch.setattr("service.commands.demo.load", lambda *_: (guard, Anything()))
    monkeypatch.setattr("service.demo.converse", converse)
    result = CliRunner().invoke(build_app(), ["demo"])
    assert result.exit_code == int(fails), result.output
    assert ("FAILED  Terror is stopped" in result.stdout) == fails

"""A keeper is given what the guard judged by: of every judged token, shown or not; it changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from guard.seen_tokens import SeenTokens
from guard.serving import ServingGuard
from tests.guard.continuous.conftest import Serve
from tests.guard.continuous.requests import CHATS, Heard
from tests.guard.generation import BLOCK, FLAG_ALL


def generate(serving: ServingGuard, chat: Any, keeper: Any, monkeypatch: pytest.MonkeyPatch) -> Heard:
    plain = serving.generate
    with monkeypatch.context() as patch:
        patch.setattr(serving, "generate", lambda *args, **named: plain(*args, **named, keeper=keeper))
        return Heard(serving, chat)


def test_scores_come_out_of_what_was_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve(*FLAG_ALL)
    for chat in CHATS:
        seen = SeenTokens()
        heard = generate(serving, chat, seen, monkeypatch).wait()
        plain = Heard(serving, chat).wait()
        report, other = heard.generation.report, plain.generation.report
        assert heard.text == plain.text
        assert report is not None
        assert other is not None
        assert report.response_scores == other.response_scores
        prompt, answer = seen.of_prompt(), seen.response()
        assert prompt is not None
        assert answer is not None
        assert len(answer.segments) == report.tokens_observed
        judged = serving.monitor.judge(prompt.acts, prompt.segments)
        scores = 1 / (1 + np.exp(-judged.agreed.max(0).astype(np.float64)))
        expected = [report.prompt_scores[domain] for domain in serving.monitor.domains]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_of_a_blocked_answer_every_judged_token_is_kept(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = serve(BLOCK)
    seen = SeenTokens()
    heard = generate(serving, CHATS[0], seen, monkeypatch).wait()
    report = heard.generation.report
    assert report is not None
    kept = seen.response()
    assert (0 if kept is None else len(kept.segments)) == report.tokens_observed
    assert seen.of_prompt() is not None


def test_a_keeper_that_raises_is_let_go_and_the_answer_goes_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        calls = 0

        def prompt(self, segments: Any, acts: Any) -> None:
            self.calls += 1
            raise RuntimeError("broken")

        token = prompt

    serving, broken = serve(*FLAG_ALL), Broken()
    assert generate(serving, CHATS[0], broken, monkeypatch).wait().text == Heard(serving, CHATS[0]).wait().text
    assert broken.calls == 1

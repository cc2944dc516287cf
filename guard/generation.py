"""One answer of a serving guard under way: told as it is judged, and with it what the guard saw of its tokens."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guard.engines.continuous import OWN
from guard.engines.decoding import TextStream
from guard.errors import GuardError
from guard.events import FinishReason, SequenceReport, StreamEvent, Verdict
from guard.shown_tokens import ShownTokens

if TYPE_CHECKING:
    from guard.engines.requests import Observer

__all__ = ["Generation", "GenerationOptions", "Heard"]

Heard = Callable[["StreamEvent | GuardError"], None]
"""Told of every event of an answer, on the model's thread; a GuardError is the last thing that it hears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How one answer is to be generated."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    steer: tuple[str, ...] = ()
    """What steers the answer from its first token on, whatever the policy says: see `guard.steering_request`."""


class Generation:
    """One answer under way. Events come through `heard`; `report` is there when the last of them has come."""

    def __init__(
        self,
        tokenizer: Any,
        options: GenerationOptions,
        refusal: str,
        heard: Heard,
        observer: Observer | None = None,
    ) -> None:
        self.request_id = f"{OWN}{uuid.uuid4().hex}"
        self.report: SequenceReport | None = None
        self._text = TextStream(tokenizer, options.stop)
        self._options = options
        self._refusal = refusal
        self._heard = heard
        self.tokens = None if observer is None else ShownTokens(observer)
        """What is observed of its tokens, until it may be told."""
        self._read = 0
        self._told = 0
        self._held = ""
        self._cancelled = False

    def advance(self, tokens: Sequence[int], verdicts: Sequence[Verdict], may_show: bool) -> bool:
        """Take the judged tokens so far. Returns whether a stop sequence has ended the answer."""
        self._push(tokens)
        if self._text.stopped:
            return True
        news = tuple(verdicts[self._told :])
        if may_show and (self._held or news):
            shown, self._held, self._told = self._held, "", len(verdicts)
            self._show(shown)
            self._heard(StreamEvent(token_id=tokens[-1] if tokens else None, text=shown, verdicts=news))
        return False

    def end(self, tokens: Sequence[int], ended: bool, report: SequenceReport, error: str | None) -> None:
        """Take the whole answer: the last event."""
        self.report = report
        blocked = report.action == "block"
        if error is not None and not blocked:
            self._heard(GuardError(f"the model stopped in the middle of an answer: {error}"))
            return
        reason: FinishReason
        if blocked:
            text, reason = self._refusal, "content_filter"
            self._show("")
        else:
            self._push(tokens)
            text = self._held + self._text.flush()
            reason = "stop" if ended or self._text.stopped else "length"
            self._show(text, last=True)
        news = tuple(report.verdicts[self._told :])
        self._heard(
            StreamEvent(token_id=None, text=text, verdicts=news, scores=report.response_scores, finish_reason=reason)
        )

    def _show(self, text: str, *, last: bool = False) -> None:
        """Tell of the tokens whose text is shown with this."""
        if self.tokens is not None:
            self.tokens.show(text, self._text.pieces, last=last)

    def _push(self, tokens: Sequence[int]) -> None:
        for token in tokens[self._read :]:
            if not self._text.stopped:
                self._held += self._text.push(token)
        self._read = len(tokens)

"""How answers come into the spool: collected token by token while they are generated, kept when they have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guard.seen_tokens import SeenTokens

if TYPE_CHECKING:
    from guard.events import Phase, SequenceReport, Verdict
    from service.answers import Choice
    from service.engine import AnsweringEngine
    from service.spool import Spooled

__all__ = ["AnswerSpool"]


class AnswerSpool:
    """The choices of one request, as far as they are to be kept.

    Every one is collected, for nobody knows beforehand which will have a verdict; most are let go again. A run that its
    request steers says what it was made to say, and is never kept. A prompt that several choices share is kept once.
    """

    def __init__(self, engine: AnsweringEngine, spool: Spooled, choices: Sequence[Choice]) -> None:
        self._engine = engine
        self._spool = spool
        self._choices = choices
        self._seen: dict[int, SeenTokens] = {}
        self._verdicts: dict[int, list[Verdict]] = {}
        self._prompts: set[tuple[int, ...]] = set()

    def keeper(self, index: int) -> dict[str, Any]:
        """The arguments with which choice `index` is collected; none where it is not."""
        if not self._spool.on or self._choices[index].options.steer:
            return {}
        self._seen[index] = SeenTokens()
        return {"keeper": self._seen[index]}

    def told(self, index: int, verdicts: Sequence[Verdict]) -> None:
        """Note verdicts on a choice that is under way."""
        if index in self._seen:
            self._verdicts.setdefault(index, []).extend(verdicts)

    def ended(self, index: int, report: SequenceReport, said: str) -> None:
        """Keep a choice that has ended, with the text that was told of it."""
        self._keep(index, report.verdicts, report.prompt_scores, report.response_scores, said)

    def broken_off(self, index: int, said: str) -> None:
        """Keep of a choice that was broken off what had a verdict; of the rest too little is known."""
        verdicts = self._verdicts.get(index, [])
        if not verdicts:
            self._seen.pop(index, None)
            return
        scores: dict[str, dict[str, float]] = {"prompt": {}, "response": {}}
        for verdict in verdicts:
            if verdict.domain in self._engine.bank.heads:
                of_phase = scores[verdict.phase]
                of_phase[verdict.domain] = max(verdict.score, of_phase.get(verdict.domain, 0.0))
        self._keep(index, verdicts, scores["prompt"], scores["response"], said, only_verdicts=True)

    def _keep(
        self,
        index: int,
        verdicts: Sequence[Verdict],
        prompt_scores: Any,
        response_scores: Any,
        said: str,
        *,
        only_verdicts: bool = False,
    ) -> None:
        seen = self._seen.pop(index, None)
        if seen is None:
            return
        seen.close()
        choice = self._choices[index]
        on: dict[Phase, list[Verdict]] = {"prompt": [], "response": []}
        for verdict in verdicts:
            on[verdict.phase].append(verdict)
        ids = tuple(choice.ids)
        if ids not in self._prompts and (on["prompt"] or not only_verdicts):
            self._prompts.add(ids)
            self._spool.part(
                self._engine,
                "prompt",
                seen.of_prompt,
                on["prompt"],
                prompt_scores,
                choice=index,
                text=choice.prompt,
                streamed=False,
            )
        if on["response"] or not only_verdicts:
            self._spool.part(
                self._engine,
                "response",
                seen.response,
                on["response"],
                response_scores,
                choice=index,
                text=said,
                streamed=True,
            )

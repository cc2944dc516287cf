"""Judging for the proxy: whole texts in batches, answers as they grow, and what becomes of an error of the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from guard.events import SequenceReport
from service.errors import ApiError, audit_failed
from service.schemas import guard_block, strongest

if TYPE_CHECKING:
    from feature_bank.layout import Role
    from feature_bank.spool_acts import Acts
    from guard.events import ActionName, Verdict
    from service.engine import ServedEngine
    from service.middleware import Record
    from service.recording import Recorder
    from service.services import Services

__all__ = ["Finding", "Growing", "JudgingEngine", "Proxied", "Released", "ResponseJudge"]


class Released(Protocol):
    """What a `ResponseJudge` has to say to more of an answer."""

    @property
    def text(self) -> str:
        """What may be shown now: all of it was judged, and stands before any token that was blocked."""

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The rules that have fired since the last time."""

    @property
    def blocked(self) -> bool:
        """Whether the answer ends here."""


class ResponseJudge(Protocol):
    """Judges one answer as it grows."""

    def push(self, text: str, *, last: bool = False) -> Released:
        """Take more of the answer; `last`: it ends with it, and all of it is released or blocked."""

    def report(self) -> SequenceReport:
        """What has been found so far."""

    def seen(self) -> Acts | None:
        """What was seen of its tokens so far, if that is kept."""


class JudgingEngine(Protocol):
    """What the proxy needs of an engine beside what every engine has."""

    def open_response(self, *, keep: bool = False) -> ResponseJudge:
        """A judge for one answer that comes piece by piece; `keep`: with what it sees of it."""


@dataclass(slots=True)
class Finding:
    """What was found in the prompt, or in one choice."""

    verdicts: list[Verdict] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    blocked: bool = False
    truncated: bool = False
    flagged: bool = False
    """Whether the policy flags it because it could not be judged."""

    @property
    def action(self) -> ActionName:
        """The strongest action."""
        own: list[ActionName] = ["block"] if self.blocked else ["flag"] if self.flagged else []
        action: Any = strongest([*own, *(verdict.action for verdict in self.verdicts)])
        return action  # type: ignore[no-any-return]  # one of what went in

    def add(self, verdicts: Sequence[Verdict], scores: Mapping[str, float]) -> None:
        """Take verdicts and probabilities in."""
        self.verdicts += verdicts
        self.blocked = self.blocked or any(verdict.action == "block" for verdict in verdicts)
        for domain, score in scores.items():
            self.scores[domain] = max(score, self.scores.get(domain, 0.0))


@dataclass(slots=True)
class Growing:
    """One text of an answer that comes piece by piece; without a judge it passes as it is."""

    judge: ResponseJudge | None = None
    opened: bool = False
    held: str = ""
    """What the judge has not released yet."""
    said: list[str] = field(default_factory=list)
    """All that it was given."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Text that could not be judged, under a policy that lets it through."""

    text: str
    verdicts: tuple[Verdict, ...] = ()
    blocked: bool = False


@dataclass(slots=True, kw_only=True)
class Proxied:
    """One request on its way through the proxy: its judge, and what was found so far."""

    services: Services
    engine: ServedEngine
    recorder: Recorder
    record: Record
    prompt: Finding = field(default_factory=Finding)
    choices: dict[int, Finding] = field(default_factory=dict)

    def choice(self, index: int) -> Finding:
        """What was found in choice `index`."""
        return self.choices.setdefault(index, Finding())

    async def judge(self, items: Sequence[tuple[Finding, str]], roles: Sequence[Role], *, choice: int = 0) -> None:
        """Judge whole texts, each for its finding; the verdicts are on record when this returns.

        Raises `ApiError`: 429 if too many wait for the judge, 503 if a verdict cannot be put on record.
        """
        texts = [text for _, text in items]
        try:
            with self.services.tracing.span("judge", texts=len(texts)):
                keep = self.recorder.spool.keep
                scores = await self.services.runner.judge(self.engine, texts, roles, keep=keep)
        except ApiError:
            raise
        except Exception as error:  # noqa: BLE001 - the policy says what becomes of it
            self._on_error(error, [finding for finding, _ in items])
            return
        for (finding, text), role, score in zip(items, roles, scores, strict=True):
            finding.add(score.verdicts, score.scores)
            finding.tokens += score.tokens
            finding.truncated = finding.truncated or score.truncated
            number = self._number(finding, choice)
            self.recorder.spool.text(self.engine, score, role, choice=number, text=text)
            await self.keep(score.verdicts, choice=number, text=text)

    async def push(self, pushes: Sequence[tuple[int, Growing, str, bool]]) -> list[Released]:
        """Judge (choice, text, what came of it, whether it ends) in one turn of the model thread, in that order.

        Once one of a choice has been blocked, nothing more of that choice is judged: what follows is empty.
        """
        engine: Any = self.engine
        judging: JudgingEngine = engine
        kept: dict[str, Any] = {"keep": True} if self.recorder.spool.on else {}

        def work() -> list[Released | Exception | None]:
            results: list[Released | Exception | None] = []
            ended = set()
            for index, growing, text, last in pushes:
                if index in ended:
                    results.append(None)
                    continue
                growing.held += text
                growing.said.append(text)
                released: Released
                try:
                    if not growing.opened:
                        growing.judge, growing.opened = judging.open_response(**kept), True
                    released = _Pass(text) if growing.judge is None else growing.judge.push(text, last=last)
                except Exception as error:  # noqa: BLE001 - the policy says what becomes of it
                    growing.judge, growing.opened = None, True
                    results.append(error)
                    if self.engine.policy.on_error == "block":
                        ended.add(index)
                    continue
                if kept and growing.judge is not None and (last or released.blocked):
                    self._spool(index, growing)
                growing.held = growing.held[len(released.text) :]
                results.append(released)
                if released.blocked:
                    ended.add(index)
            return results

        found: list[Released] = []
        for (index, growing, _, _), result in zip(pushes, await self.services.runner.call(work), strict=True):
            finding = self.choice(index)
            if result is None:
                found.append(_Pass("", blocked=True))
            elif isinstance(result, Exception):
                self._on_error(result, [finding])
                held, growing.held = growing.held, ""
                found.append(_Pass("" if finding.blocked else held, blocked=finding.blocked))
            else:
                highest = {verdict.domain: verdict.score for verdict in result.verdicts if verdict.domain}
                finding.add(result.verdicts, highest)
                finding.blocked = finding.blocked or result.blocked
                # Before the text that follows is told.
                await self.keep(result.verdicts, choice=index, text="".join(growing.said) if result.verdicts else None)
                found.append(result)
        return found

    async def keep(self, verdicts: Sequence[Verdict], *, choice: int, text: str | None = None) -> None:
        """Put verdicts on record. Raises `ApiError` (503) if that fails and the policy wants nothing to go out then."""
        for verdict in verdicts:
            self.services.metrics.count_verdict(verdict)
        if not await self.recorder.record(self.engine, verdicts, choice=choice, text=text):
            raise audit_failed()

    def count(self, phase: Any, finding: Finding) -> None:
        """Add a judged prompt or choice to the metrics, and its action to the request's log line."""
        self.services.metrics.count_request(phase, finding.action)
        self.services.metrics.observe_scores(finding.scores)
        self.record.action = strongest([self.record.action or "allow", finding.action])

    def block(self, choices: Sequence[int]) -> dict[str, Any]:
        """The `sailguard` block for these choices."""
        findings = [self.prompt, *(self.choice(index) for index in choices)]
        reports = {index: self._report(self.choice(index)) for index in choices}
        block = guard_block(reports, self.engine.bank_version, self.engine.policy_version)
        return {**block, "truncated": any(finding.truncated for finding in findings)}

    def _report(self, finding: Finding) -> SequenceReport:
        action: Any = strongest([self.prompt.action, finding.action])
        return SequenceReport(
            request_id=self.record.request_id,
            action=action,
            verdicts=(*self.prompt.verdicts, *finding.verdicts),
            prompt_scores=self.prompt.scores,
            response_scores=finding.scores,
            tokens_generated=finding.tokens,
            tokens_observed=finding.tokens,
        )

    def _spool(self, index: int, growing: Growing) -> None:
        """Keep an answer that has ended, or was blocked, as it was seen. Called on the model thread."""
        judge = growing.judge
        assert judge is not None
        report = judge.report()
        self.recorder.spool.part(
            self.engine,
            "response",
            judge.seen,
            report.verdicts,
            report.response_scores,
            choice=index,
            text="".join(growing.said),
            streamed=True,
        )

    def _number(self, finding: Finding, otherwise: int) -> int:
        return next((index for index, other in self.choices.items() if other is finding), otherwise)

    def _on_error(self, error: Exception, findings: Sequence[Finding]) -> None:
        on_error = self.engine.policy.on_error
        self.services.metrics.count_error(on_error)
        self.record.fail(error)
        for finding in findings:
            finding.blocked = finding.blocked or on_error == "block"
            finding.flagged = finding.flagged or on_error == "flag"

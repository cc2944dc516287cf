"""What the guard says: verdicts, stream events and reports. Plain frozen records, JSON-ready through `to_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from feature_bank.spool_acts import Acts

Phase = Literal["prompt", "response"]
ActionName = Literal["allow", "flag", "steer", "block"]
FinishReason = Literal["stop", "length", "content_filter"]
SEVERITY: Mapping[str, int] = {"allow": 0, "flag": 1, "steer": 2, "block": 3}


class _Record:
    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as plain lists, dicts, numbers and strings."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # every subclass is a dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureHit(_Record):
    """One feature's part in a score."""

    id: str
    layer: int
    explanation: str
    activation: float
    """Mean over the window, in units of the feature's 99.9th percentile."""
    contribution: float
    """What it added to the domain's logit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(_Record):
    """A rule fired."""

    request_id: str
    phase: Phase
    token_index: int
    """Position of the deciding token: in the prompt's ids, or counted from the first generated token."""
    domain: str
    """Of what the rule is about; empty for a feature that has none."""
    score: float
    """Calibrated probability at the deciding token; for a rule on a concept or a feature, its activation there."""
    threshold: float
    action: ActionName
    rule: str
    features: tuple[FeatureHit, ...]
    bank_version: str
    policy_version: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The record that `to_dict` made this of."""
        return cls(**{**data, "features": tuple(FeatureHit(**hit) for hit in data["features"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent(_Record):
    """One step of a stream: text that is safe to show, the verdicts that came with it, and how the stream
    ended, if it did."""

    token_id: int | None
    text: str
    verdicts: tuple[Verdict, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    """Each domain's calibrated probability at the last judged token, averaged over the window so far."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport(_Record):
    """All that was found in one sequence of a generation."""

    request_id: str
    action: ActionName
    verdicts: tuple[Verdict, ...]
    prompt_scores: Mapping[str, float]
    """Highest probability a domain reached in the prompt."""
    response_scores: Mapping[str, float]
    tokens_generated: int
    tokens_observed: int
    """Generated tokens whose activations were judged; equal to `tokens_generated` unless a token ended the sequence."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SequenceReport:
        """The record that `to_dict` made this of."""
        return cls(**{**data, "verdicts": tuple(map(Verdict.from_dict, data["verdicts"]))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(_Record):
    """A finished guarded answer. When it was blocked, `text` is the policy's refusal text."""

    text: str
    finish_reason: FinishReason
    report: SequenceReport
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore(_Record):
    """A text judged on its own."""

    scores: Mapping[str, float]
    flagged: Mapping[str, bool]
    action: ActionName
    verdicts: tuple[Verdict, ...]
    features: Mapping[str, tuple[FeatureHit, ...]]
    tokens: int
    truncated: bool
    seen: Acts | None = field(default=None, repr=False, compare=False)
    """What the guard saw of the judged tokens, where that was asked for. It stays within the process."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, without what was seen."""
        data = asdict(replace(self, seen=None))
        del data["seen"]
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceToken(_Record):
    """One token of a trace. Activations are those of the token itself, not of the window."""

    index: int
    token_id: int
    text: str
    """Those of all tokens make up the text: empty for a token that ends within a character."""
    observed: bool
    scores: Mapping[str, float]
    features: tuple[FeatureHit, ...]
    segment: int | None = None
    """Of a prompt's token that is judged, the number of its message; None where there is but one text."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values; without the segment if there is none."""
        data = asdict(self)
        if self.segment is None:
            del data["segment"]
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace(_Record):
    """Token by token, what the guard saw."""

    tokens: tuple[TraceToken, ...]
    score: TextScore

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return {"tokens": [token.to_dict() for token in self.tokens], "score": self.score.to_dict()}

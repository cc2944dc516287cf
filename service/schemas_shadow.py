"""`/admin/shadow` as it stands on the wire."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from feature_bank.intervals import wilson

if TYPE_CHECKING:
    from service.spool import Kept

__all__ = [
    "ShadowCount",
    "ShadowDisagreement",
    "ShadowRate",
    "ShadowReport",
    "ShadowRequest",
    "ShadowStatus",
    "rate_of",
]

Kind = Literal["only_current", "only_candidate"]


class ShadowRequest(BaseModel):
    """Body of `POST /admin/shadow`."""

    model_config = ConfigDict(extra="forbid")

    version: str | None = Field(
        min_length=1, max_length=250, description="A version in the store, or its beginning; null ends the shadow."
    )


class ShadowRate(BaseModel):
    """How often it happened."""

    count: int
    rate: float | None = Field(description="Share of the texts that were judged.")
    low: float | None = Field(description="Of Wilson's 95 % interval.")
    high: float | None


class ShadowCount(BaseModel):
    """A domain's disagreements."""

    only_current: ShadowRate
    only_candidate: ShadowRate


class ShadowDisagreement(BaseModel):
    """One text on which the two decided differently; the text itself is not kept."""

    time: str
    request_id: str
    endpoint: str
    choice: int
    phase: Literal["prompt", "response"]
    streamed: bool
    domain: str
    kind: Kind

    @classmethod
    def of(cls, kept: Kept, *, domain: str, kind: str) -> Self:
        """What is told of a judged text."""
        return cls(
            time=datetime.fromtimestamp(kept.unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            request_id=kept.request_id,
            endpoint=kept.endpoint,
            choice=kept.choice,
            phase=kept.phase,
            streamed=kept.streamed,
            domain=domain,
            kind="only_current" if kind == "only_current" else "only_candidate",
        )


class ShadowStatus(BaseModel):
    """What has been counted of a candidate in this process."""

    candidate: str
    beside: str | None = Field(
        description="The bank whose decisions were compared, null before the first text. With another one all counts "
        "begin anew."
    )
    stopped: str | None = Field(
        description="Why the candidate judges no more, null while it does: a bank with other features is in use. The "
        "counts are those from before."
    )
    texts: int = Field(description="Texts, prompts and answers that both have judged.")
    errors: int
    skipped: int = Field(
        description="Texts that were too long, came faster than the shadow judges, or were judged by a bank that has "
        "been replaced or cannot be compared."
    )
    domains: dict[str, ShadowCount]
    latest: list[ShadowDisagreement]


class ShadowReport(BaseModel):
    """The bank in use, and the candidate beside it if there is one."""

    current: str
    shadow: ShadowStatus | None
    promote: str | None = Field(description="The one command that makes the candidate the current version.")


def rate_of(count: int, texts: int) -> ShadowRate:
    """A share with Wilson's 95 % interval."""
    if not texts:
        return ShadowRate(count=count, rate=None, low=None, high=None)
    low, high = wilson(count, texts)
    return ShadowRate(count=count, rate=count / texts, low=low, high=high)

"""`/admin/shadow` as it stands on the wire."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

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
    texts: int = Field(description="Texts, prompts and answers that both have judged.")
    errors: int
    skipped: int = Field(description="Texts that were too long, or came faster than the shadow judges.")
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
    p, z = count / texts, 1.96
    centre = (p + z * z / (2 * texts)) / (1 + z * z / texts)
    margin = z * ((max(p * (1 - p), 0.0) + z * z / (4 * texts)) / texts) ** 0.5 / (1 + z * z / texts)
    return ShadowRate(count=count, rate=p, low=max(0.0, centre - margin), high=min(1.0, centre + margin))

"""Comparisons of two banks or policies, as they stand on the wire."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.policies import MAX_POLICY
from service.routes.traces import RuleVerdict

__all__ = [
    "MAX_TEXTS",
    "Choice",
    "Choices",
    "ComparedSide",
    "ComparedText",
    "Comparison",
    "ComparisonRequest",
    "ComparisonSummary",
    "SideRequest",
    "SideVersions",
]

MAX_TEXTS = 200

# Between fields, and checked by a validator; pydantic does not know how to say it.
_ONE_POLICY: dict[str, Any] = {
    "not": {
        "properties": {"policy": {"type": "string"}, "yaml": {"type": "string"}},
        "required": ["policy", "yaml"],
    }
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class SideRequest(_Body):
    """One side of a comparison. What is left out is what is in use."""

    model_config = ConfigDict(json_schema_extra=_ONE_POLICY)

    bank: str | None = Field(default=None, min_length=1, max_length=250)
    """Id of a bank, as `GET /v1/compare` lists it."""
    policy: str | None = Field(default=None, min_length=1, max_length=250)
    """Id of a policy, as `GET /v1/compare` lists it."""
    yaml: str | None = Field(default=None, min_length=1, max_length=MAX_POLICY)
    """A policy file's text, in place of `policy`."""

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.policy is not None and self.yaml is not None:
            raise ValueError("give one of 'policy' and 'yaml', not both")
        return self


class ComparisonRequest(_Body):
    """Body of `POST /v1/compare`."""

    texts: list[str] = Field(min_length=1, max_length=MAX_TEXTS)
    """What is judged by both sides."""
    role: Literal["prompt", "response", "passage"] = "prompt"
    """What the texts are: users' messages, answers, or texts on their own."""
    left: SideRequest = SideRequest()
    """What is compared with."""
    right: SideRequest = SideRequest()
    """What is compared."""


class SideVersions(BaseModel):
    """What one side judged by."""

    bank: str
    policy: str


class ComparedSide(BaseModel):
    """What one side says of a text."""

    action: Literal["allow", "flag", "steer", "block"]
    scores: dict[str, float]
    flagged: dict[str, bool]
    verdicts: list[RuleVerdict]


class ComparedText(BaseModel):
    """One text under both sides."""

    index: int
    left: ComparedSide
    right: ComparedSide
    changed: bool = Field(description="Whether the action or a flagged domain is another one.")


class ComparisonSummary(BaseModel):
    """How the right side differs from the left one, over all texts."""

    changed: int
    newly_blocked: int = Field(description="Texts that the right side alone blocks.")
    newly_allowed: int = Field(description="Texts that the right side alone lets through without any action.")
    mean_score_change: dict[str, float] = Field(description="Right less left, of each domain that both sides score.")


class Comparison(BaseModel):
    """What two sides say of the same texts."""

    object: Literal["comparison"] = "comparison"
    left: SideVersions
    right: SideVersions
    results: list[ComparedText]
    summary: ComparisonSummary


class Choice(BaseModel):
    """A bank or a policy that can be chosen."""

    id: str
    label: str
    current: bool = Field(description="Whether it is the one in use.")


class Choices(BaseModel):
    """What can be compared."""

    object: Literal["choices"] = "choices"
    banks: list[Choice]
    policies: list[Choice]

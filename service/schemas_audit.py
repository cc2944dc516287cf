"""Reviews and the audit, as `/admin` takes and shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from feature_bank.verdicts import VISIBLE, Draft, Review
from service.schemas_features import Label

__all__ = ["AuditHistory", "AuditList", "AuditedFeature", "AuditedVerdict", "ReviewRequest", "Reviewed"]

_LABELS = {"domains", "concepts", "explanation"}


def _given(names: set[str]) -> dict[str, Any]:
    """The schema of an object that has one of these fields, not null."""
    forms = [{"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in sorted(names)]
    return {"type": "object", "anyOf": forms}


class ReviewRequest(Draft):
    """Body of `POST /admin/reviews`: what a person says of a feature."""

    # Between fields, and checked by a validator; pydantic does not know how to say it.
    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"verdict": {"const": "relabel"}}, "required": ["verdict"]},
            "then": {"required": ["overrides"], "properties": {"overrides": _given(_LABELS)}},
            "else": {"properties": {"overrides": {"not": _given(_LABELS)}}},
            "allOf": [
                {
                    "if": {"properties": {"verdict": {"enum": ["reject", "note"]}}, "required": ["verdict"]},
                    "then": {"required": ["reason"], "properties": {"reason": {"pattern": VISIBLE}}},
                }
            ],
        }
    )

    def draft(self) -> Draft:
        """What the bank's log keeps of it."""
        return Draft.model_validate(self.model_dump())


class Reviewed(BaseModel):
    """A review that was added, and what holds of the feature now."""

    object: Literal["review"] = "review"
    review: Review
    effective: Label


class AuditedFeature(BaseModel):
    """A feature that contributed to a verdict."""

    id: str
    layer: int
    explanation: str
    activation: float | None
    contribution: float | None


class AuditedVerdict(BaseModel):
    """One entry of the audit: an event with its number, and with its text if that was kept."""

    id: int
    type: Literal["verdict"] = "verdict"
    time: str
    request_id: str
    key_id: str | None
    endpoint: str
    phase: Literal["prompt", "response"]
    choice: int
    action: Literal["allow", "flag", "steer", "block"]
    domain: str
    rule: str
    score: float | None
    threshold: float | None
    token_index: int
    features: list[AuditedFeature]
    model: str
    bank: str
    policy: str
    text: str | None


class AuditList(BaseModel):
    """Entries, the newest first."""

    object: Literal["list"] = "list"
    data: list[AuditedVerdict]
    kept: bool = Field(description="Whether the server keeps the judged texts.")


class CountedFeature(BaseModel):
    """In how many verdicts a feature was among the strongest."""

    id: str
    count: int
    explanation: str


class AuditHistory(BaseModel):
    """Verdicts a minute, the present minute last, and the features that came up most."""

    object: Literal["history"] = "history"
    minutes: int
    start: float = Field(description="When the first minute began, in seconds since 1970.")
    domains: dict[str, dict[Literal["flag", "steer", "block"], list[int]]] = Field(
        description="By domain and action the verdicts of each minute. The domain of a rule on a feature may be empty."
    )
    features: list[CountedFeature]

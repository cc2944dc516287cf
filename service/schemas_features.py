"""The bank's features as they stand on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from feature_bank.schema import FeatureRecord
from feature_bank.verdicts import Review

__all__ = ["FeatureDetail", "FeatureList", "FeatureSummary", "HeadPart", "Label", "SortKey", "Status"]

Status = Literal["unreviewed", "accepted", "rejected"]
SortKey = Literal["auroc", "fidelity", "density", "id", "layer"]


class Label(BaseModel):
    """What holds of a feature after its reviews."""

    domains: list[str]
    concepts: list[str]
    explanation: str
    status: Status
    reviewer: str | None
    time: str | None


class FeatureSummary(BaseModel):
    """One feature of a list. Domains, concepts and explanation are those that reviews left."""

    id: str
    hook_name: str
    layer: int
    index: int
    domains: list[str]
    concepts: list[str]
    explanation: str
    status: Status
    admitted: bool
    kind: Literal["lexical", "conceptual"] | None
    direction: str = Field(description="What it is the direction of; empty for a feature of an SAE.")
    auroc: float | None
    fidelity: float | None = Field(
        description="How well the explanation predicts where it fires, as a correlation: of segments, else of tokens."
    )
    density: float
    relevance: float | None
    found_in: list[str] | None


class FeatureList(BaseModel):
    """A page of features: best matches first, without a query those that find their domain best, unless `sort` says
    otherwise."""

    object: Literal["list"] = "list"
    data: list[FeatureSummary]
    total: int
    limit: int
    offset: int
    bank: str


class HeadPart(BaseModel):
    """A feature's part in one domain's head."""

    weight: float
    steering: float


class FeatureDetail(BaseModel):
    """All that the bank holds of a feature, its parts in the domains' heads, and its reviews."""

    object: Literal["feature"] = "feature"
    bank: str
    feature: FeatureRecord
    heads: dict[str, HeadPart]
    effective: Label
    reviews: list[Review]

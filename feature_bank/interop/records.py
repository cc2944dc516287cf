"""What others publish of one feature, as a record: kept as they said it, empty where they said nothing."""

from __future__ import annotations

from typing import Any

from pydantic import Field, FiniteFloat, model_validator

from feature_bank.schema import Explainer, FeatureRecord, Probability, Record, Sha256
from feature_bank.taxonomy import Domain

__all__ = ["Example", "Histogram", "ImportedExplanation", "ImportedFeature", "Loss", "SourceFile"]


class ImportedExplanation(Record):
    """One text about a feature, and how its publisher says it was made."""

    text: str
    kind: str | None = None
    """The publisher's name for the way it was made, such as `oai_token-act-pair`."""
    model: str | None = None
    """The language model that wrote it."""


class Histogram(Record):
    """Bars at the middle of their bins."""

    values: list[FiniteFloat]
    heights: list[FiniteFloat]

    @model_validator(mode="after")
    def _aligned(self) -> Histogram:
        if len(self.values) != len(self.heights):
            raise ValueError("values and heights must have one entry a bar")
        return self


class Example(Record):
    """A text on which the feature fires, and the interval of activations that it stands for, if one is named."""

    tokens: list[str] = Field(min_length=1)
    activations: list[FiniteFloat]
    """On each of `tokens`, in the activation's own units."""
    bin_min: FiniteFloat | None = None
    bin_max: FiniteFloat | None = None
    bin_contains: FiniteFloat | None = None
    """Share of the activations that lie in the interval."""

    @model_validator(mode="after")
    def _aligned(self) -> Example:
        if len(self.tokens) != len(self.activations):
            raise ValueError("tokens and activations must have one entry a token")
        return self


class ImportedFeature(Record):
    """A feature as its publisher describes it. What was not published stays empty; nothing is filled in."""

    id: str = Field(pattern=r"^L\d+/\d+$")
    layer: int = Field(ge=0)
    index: int = Field(ge=0)
    hook_name: str | None = None
    domains: list[Domain] = Field(default_factory=list)
    """The publisher's tags."""
    explanations: list[ImportedExplanation] = Field(default_factory=list)
    """The publisher's, in its order. Empty: none was published."""
    masked: bool = False
    """Whether the publisher holds the explanation back and shows a mask in its place."""
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)
    density: Probability | None = None
    """Share of tokens on which it fires."""
    max_activation: FiniteFloat | None = None
    """The largest that was seen, in the activation's own units."""
    histogram: Histogram | None = None
    """Of the activations above zero, in their own units."""
    logit_histogram: Histogram | None = None
    promoted_tokens: list[str] = Field(default_factory=list)
    promoted_logits: list[FiniteFloat] = Field(default_factory=list)
    suppressed_tokens: list[str] = Field(default_factory=list)
    suppressed_logits: list[FiniteFloat] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    vector: list[FiniteFloat] = Field(default_factory=list)
    """The decoder's direction, (d_in,)."""

    @model_validator(mode="after")
    def _consistent(self) -> ImportedFeature:
        if self.id != f"L{self.layer}/{self.index}":
            raise ValueError(f"{self.id!r} is not the id of feature {self.index} of layer {self.layer}")
        for tokens, logits in (
            (self.promoted_tokens, self.promoted_logits),
            (self.suppressed_tokens, self.suppressed_logits),
        ):
            if len(tokens) != len(logits):
                raise ValueError("tokens and their logits must have one entry a token")
        return self

    @property
    def explanation(self) -> str | None:
        """The first explanation, as published; None if there is none."""
        return self.explanations[0].text if self.explanations else None

    def to_record(
        self, *, hook_name: str, threshold: float, scale: float, density: float, **more: Any
    ) -> FeatureRecord:
        """The bank's record of it, with what only an SAE and text can tell; `more` are further fields of the record.

        An explanation that was never published becomes an empty text without an explainer; a masked one stays masked.
        """
        first = self.explanations[0] if self.explanations else None
        fields: dict[str, Any] = {
            "id": self.id,
            "hook_name": hook_name,
            "layer": self.layer,
            "index": self.index,
            "domains": self.domains,
            "explanation": first.text if first else "",
            "explainer": Explainer(method="imported", model=first.model) if first else None,
            "promoted_tokens": self.promoted_tokens,
            "threshold": threshold,
            "scale": scale,
            "density": density,
            **more,
            "scores": {**self.scores, **more.get("scores", {})},
        }
        return FeatureRecord(**fields)


class Loss(Record):
    """Something that one side holds and the other has no place for."""

    field: str
    count: int = Field(ge=0)
    """How many features (or files, or rows of a table) have it."""
    reason: str


class SourceFile(Record):
    """A file that was read."""

    name: str
    sha256: Sha256

"""The columns of Neuronpedia's rows that a collection keeps, checked on reading."""
# ruff: noqa: N815  # the columns' names are theirs

from __future__ import annotations

from pydantic import Field, FiniteFloat, ValidationError

from feature_bank.errors import BankError
from feature_bank.schema import Probability, Record

__all__ = ["ActivationRow", "ExplanationRow", "FeatureRow", "Row", "malformed"]


class Row(Record):
    """What is kept of a row of any table."""

    index: int = Field(ge=0)


class FeatureRow(Row):
    """Of `features`."""

    maxActApprox: FiniteFloat | None = None
    frac_nonzero: Probability | None = None
    freq_hist_data_bar_heights: list[FiniteFloat] = Field(default_factory=list)
    freq_hist_data_bar_values: list[FiniteFloat] = Field(default_factory=list)
    logits_hist_data_bar_heights: list[FiniteFloat] = Field(default_factory=list)
    logits_hist_data_bar_values: list[FiniteFloat] = Field(default_factory=list)
    neg_str: list[str] = Field(default_factory=list)
    neg_values: list[FiniteFloat] = Field(default_factory=list)
    pos_str: list[str] = Field(default_factory=list)
    pos_values: list[FiniteFloat] = Field(default_factory=list)
    vector: list[FiniteFloat] = Field(default_factory=list)
    hookName: str | None = None


class ActivationRow(Row):
    """Of `activations`."""

    tokens: list[str]
    values: list[FiniteFloat]
    binMin: FiniteFloat | None = None
    binMax: FiniteFloat | None = None
    binContains: FiniteFloat | None = None


class ExplanationRow(Row):
    """Of `explanations`."""

    description: str
    typeName: str | None = None
    explanationModelName: str | None = None


def malformed(error: ValidationError, place: str) -> BankError:
    """The error for a row that is not as its columns must be; `place` is FILE:LINE."""
    first = error.errors()[0]
    return BankError(first["msg"], file=place, field=".".join(str(part) for part in first["loc"]) or None)

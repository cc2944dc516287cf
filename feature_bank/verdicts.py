"""A review as a person gives it, and as a bank keeps it."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from feature_bank.errors import BankError
from feature_bank.schema import Record, Sha256
from feature_bank.taxonomy import Domain

R = TypeVar("R", bound=Record)
Verdict = Literal["accept", "reject", "relabel", "note"]

# What a terminal would obey, marks that reorder what is shown, and halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# The same as JSON schema says it. White space may be there, for it is tidied; halves of characters cannot.
_SHOWN = r"[^\u0000-\u0008\u000e-\u001b\u007f-\u0084\u0086-\u009f\u202a-\u202e\u2066-\u2069]*"
_SEEN = r"[^\s\u0000-\u0020\u007f-\u00a0\u202a-\u202e\u2066-\u2069]"
VISIBLE = f"^{_SHOWN}{_SEEN}{_SHOWN}$"
"""JSON schema's pattern of a line in which something can be seen."""


class _Pattern:
    """What a text looks like, for its JSON schema alone: the validator beside it says better what is wrong."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(schema), "pattern": self._pattern}


def _tidy(text: Any) -> Any:
    """One line, without space around it; control characters that are no white space are refused."""
    if not isinstance(text, str):
        return text
    line = " ".join(text.split())
    if found := _UNPRINTABLE.search(line):
        raise ValueError(f"holds the control character U+{ord(found[0]):04X}; remove it")
    return line


def write_moment(moment: datetime) -> str:
    """A moment in UTC, to the microsecond: `2025-01-31T12:00:00.000000Z`. Earlier ones sort first."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def read_moment(text: str) -> datetime:
    """What `write_moment` wrote. Raises ValueError for anything else."""
    moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    if write_moment(moment) != text:
        raise ValueError(f"{text!r} is no time such as 2025-01-31T12:00:00.000000Z")
    return moment


def _check_moment(text: str) -> str:
    read_moment(text)
    return text


Moment = Annotated[str, AfterValidator(_check_moment)]
Line = Annotated[str, BeforeValidator(_tidy), _Pattern(f"^{_SHOWN}$")]
VisibleLine = Annotated[Line, _Pattern(VISIBLE)]
ConceptId = Annotated[VisibleLine, Field(min_length=1, max_length=100)]


class Overrides(Record):
    """What a reviewer puts in the place of the machine's label; None leaves the field as it is."""

    domains: Annotated[list[Domain], Field(max_length=8)] | None = None
    concepts: Annotated[list[ConceptId], Field(max_length=32)] | None = None
    explanation: Annotated[VisibleLine, Field(min_length=1, max_length=2000)] | None = None


class Draft(Record):
    """A review as a person gives it."""

    feature: str = Field(pattern=r"^L\d+/\d+$", max_length=40)
    verdict: Verdict
    overrides: Overrides | None = None
    reviewer: Annotated[VisibleLine, Field(min_length=1, max_length=100)]
    reason: Annotated[Line, Field(max_length=2000)] = ""

    @model_validator(mode="after")
    def _complete(self) -> Draft:
        given = self.overrides is not None and self.overrides != Overrides()
        if self.verdict == "relabel" and not given:
            raise ValueError("a relabel needs domains, concepts or an explanation")
        if self.verdict != "relabel" and given:
            raise ValueError(f"only a relabel changes labels, not {self.verdict!r}")
        if self.verdict in ("reject", "note") and not self.reason:
            raise ValueError(f"{self.verdict!r} needs a reason")
        return self


class Review(Draft):
    """One line of reviews.jsonl."""

    time: Moment
    bank: str = Field(min_length=1)
    """The version it was given at, as `Bank.version` writes it."""
    content_hash: Sha256
    sae_sha256: Sha256
    """The SAE of the feature's hook point."""


def parse_record(record: type[R], data: Any, place: str) -> R:
    """`data` as a record. Raises BankError naming the place and the field."""
    try:
        return record.model_validate(data)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise BankError(message, file=place, field=".".join(map(str, first["loc"])) or None) from e

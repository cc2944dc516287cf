"""The spool and its marks, as `/admin/spool` takes and shows them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MarkRequest", "Marked", "ShownMark", "SpoolList", "SpooledItem"]

MarkName = Literal["false_positive", "miss", "correct"]
_VISIBLE = r"\S"


class MarkRequest(BaseModel):
    """Body of `POST /admin/spool/{id}/marks`: what a person says of a judgement in one domain."""

    model_config = ConfigDict(extra="forbid")

    domain: str = Field(min_length=1, max_length=200)
    mark: MarkName = Field(
        description="It was flagged and should not be, it was not and should be, or it is as it should be."
    )
    reviewer: str = Field(min_length=1, max_length=200, pattern=_VISIBLE)
    reason: str = Field(default="", max_length=2000)


class ShownMark(BaseModel):
    """A mark. The last one of an item and a domain counts."""

    item: int
    domain: str
    mark: MarkName
    reviewer: str
    reason: str
    time: str


class SpooledItem(BaseModel):
    """One item of the spool, without its activations."""

    id: int
    time: str
    request_id: str
    endpoint: str
    choice: int
    phase: Literal["prompt", "response"]
    streamed: bool = Field(description="Whether it was judged token by token.")
    action: Literal["allow", "flag", "steer", "block"]
    scores: dict[str, float]
    flagged: list[str]
    tokens: int
    why: Literal["sampled", "verdict", "marked"]
    model: str
    bank: str
    policy: str
    text: str | None
    marks: list[ShownMark] = Field(description="All of its marks, the oldest first.")


class SpoolList(BaseModel):
    """Items, the newest first."""

    object: Literal["list"] = "list"
    data: list[SpooledItem]
    kept: bool = Field(description="Whether the server keeps the texts.")


class Marked(BaseModel):
    """A mark that was added."""

    object: Literal["mark"] = "mark"
    mark: ShownMark

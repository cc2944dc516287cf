"""Responses as they stand in the OpenAPI document.

The routes build plain dictionaries; the tests hold them to these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas_errors import ErrorResponse

__all__ = [
    "CHAT_RESPONSES",
    "COMPLETION_RESPONSES",
    "EVENTS",
    "MODERATION_RESPONSES",
    "ChatCompletion",
    "ChatCompletionChunk",
    "Completion",
    "CompletionChunk",
    "FeatureHit",
    "FiredRule",
    "HealthResponse",
    "ModelEntry",
    "ModelList",
    "Moderation",
    "Readiness",
]

Action = Literal["allow", "flag", "steer", "block"]
FinishReason = Literal["stop", "length", "content_filter"]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class FeatureHit(_Shape):
    """One feature's part in a score."""

    id: str
    layer: int
    explanation: str
    activation: float
    """Mean over the window, in units of the feature's 99.9th percentile."""
    contribution: float
    """What it added to the domain's logit."""


class FiredRule(_Shape):
    """A rule of the policy fired."""

    request_id: str
    phase: Literal["prompt", "response"]
    token_index: int
    domain: str
    score: float
    threshold: float
    action: Action
    rule: str
    features: list[FeatureHit]
    bank_version: str
    policy_version: str


class Verdict(FiredRule):
    """A rule of the policy fired on one of the answers."""

    choice: int


class GuardBlock(_Shape):
    """What the guard has to say of an answer."""

    action: Action
    verdicts: list[Verdict]
    prompt_scores: dict[str, float]
    response_scores: dict[str, float]
    bank: str
    policy: str


class Usage(_Shape):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Message(_Shape):
    """An answer to a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Shape):
    """One of the answers."""

    index: int
    message: Message
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(_Shape):
    """A whole answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    sailguard: GuardBlock


class TextChoice(_Shape):
    """One of the continuations."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason


class Completion(_Shape):
    """A whole answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    sailguard: GuardBlock


class Delta(_Shape):
    """What comes to an answer: the role first, then its text piece by piece, at last nothing."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(_Shape):
    """What comes to one of the answers."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Shape):
    """One event of a streamed `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice] = Field(max_length=1)
    """One choice; none in the event that tells the usage."""
    usage: Usage | None = None
    """With `include_usage`: none but in the last event."""
    sailguard: GuardBlock | None = None
    """In the last event of a choice: what the guard has to say of it."""


class CompletionChunkChoice(_Shape):
    """What comes to one of the continuations."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class CompletionChunk(_Shape):
    """One event of a streamed `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice] = Field(max_length=1)
    """One choice; none in the event that tells the usage."""
    usage: Usage | None = None
    """With `include_usage`: none but in the last event."""
    sailguard: GuardBlock | None = None
    """In the last event of a choice: what the guard has to say of it."""


class DomainJudgement(_Shape):
    """What one domain's head says of a text."""

    score: float
    flagged: bool
    action: Action
    features: list[FeatureHit]


class Judgement(_Shape):
    """What is said of one text: OpenAI's categories, and ours in `sailguard`."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]
    sailguard: dict[str, DomainJudgement]
    tokens: int
    truncated: bool
    """Whether the end of the text was left out because it is too long."""


class Versions(_Shape):
    """The bank and the policy that judged."""

    bank: str
    policy: str


class Moderation(_Shape):
    """Answer of `POST /v1/moderations`, one result a text."""

    id: str
    model: str
    results: list[Judgement]
    sailguard: Versions


class HealthResponse(_Shape):
    """The process lives."""

    status: Literal["ok"]


class Readiness(_Shape):
    """The guard is in place."""

    status: Literal["ready"]
    model: str
    bank: str
    policy: str


class ModelEntry(_Shape):
    """One name under which the model answers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Shape):
    """The names under which the model answers."""

    object: Literal["list"]
    data: list[ModelEntry] = Field(min_length=1)


EVENTS: tuple[type[BaseModel], ...] = (ChatCompletionChunk, CompletionChunk)
"""What stands in the document beside the responses, for the events of streams refer to it."""

_ACTION: dict[str, Any] = {
    "X-Sailguard-Action": {
        "description": "The strongest action taken; not on a stream.",
        "schema": {"type": "string", "enum": ["allow", "flag", "steer", "block"]},
    }
}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": reference}


def _answer(
    model: type[BaseModel], description: str, *, event: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    found: dict[str, Any] = {"model": model, "description": description, "headers": _ACTION}
    if event is not None:
        found["content"] = {
            "text/event-stream": {
                # Of one event, for OpenAPI has no word yet for a sequence of them.
                "schema": {
                    "type": "object",
                    "description": "One event; the last is `[DONE]`, or an error if the answer could not be completed.",
                    "properties": {"data": {"anyOf": [{"const": "[DONE]"}, _json(event), _json(ErrorResponse)]}},
                    "required": ["data"],
                }
            }
        }
    return {200: found}


CHAT_RESPONSES = _answer(ChatCompletion, "The answer; with `stream` as server-sent events.", event=ChatCompletionChunk)
COMPLETION_RESPONSES = _answer(
    Completion, "The continuation; with `stream` as server-sent events.", event=CompletionChunk
)
MODERATION_RESPONSES = _answer(Moderation, "One result a text, in order.")

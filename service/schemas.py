"""Requests and responses as they stand on the wire: OpenAI's shapes plus one block named `sailguard`.

Requests are pydantic models that refuse what the server cannot honour. Responses are built by functions
that return JSON-ready dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from feature_bank import DOMAINS
from guard.events import SEVERITY

if TYPE_CHECKING:
    from guard.events import SequenceReport, TextScore

__all__ = [
    "ACTION_HEADER",
    "MODEL_ALIAS",
    "ChatRequest",
    "CompletionRequest",
    "GenerationRequest",
    "ModerationRequest",
    "guard_block",
    "moderation_result",
    "strongest",
    "usage",
]

ACTION_HEADER = "X-Sailguard-Action"
"""Response header with the strongest action taken on any choice."""

MODEL_ALIAS = "sailguard"
"""Model name that every server accepts beside the id of the model it serves."""

MAX_CHOICES = 8
MAX_MESSAGES = 1024
MAX_PROMPTS = 32
MAX_STOPS = 4
MAX_INPUTS = 256

_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""OpenAI's moderation categories. Those that no domain maps to are always false with a score of 0."""

_CATEGORY_OF = {"pornography": "sexual", "violence": "violence"}
"""Domains that mean what an OpenAI category means; the others stand in the `sailguard` block alone."""

_SEEDS = 9_223_372_036_854_776_000  # 2 ** 63, rounded as it is where it stands in the OpenAPI document

# Between fields, and checked by validators; pydantic does not know how to say it.
_OPTIONS_OF_A_STREAM: dict[str, Any] = {
    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
_ONE_LIMIT: dict[str, Any] = {
    "not": {
        "properties": {"max_tokens": {"type": "integer"}, "max_completion_tokens": {"type": "integer"}},
        "required": ["max_tokens", "max_completion_tokens"],
    }
}

# Parameters that never change an answer; accepted and left alone.
_WITHOUT_EFFECT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"})


def _as_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Text = Annotated[str, Field(min_length=1)]
# 2.0 is an integer on the wire.
_Tokens = Annotated[StrictInt, Field(ge=1), BeforeValidator(_as_int)]
_Seed = Annotated[StrictInt, Field(ge=-_SEEDS, le=_SEEDS), BeforeValidator(_as_int)]
_Choices = Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES), BeforeValidator(_as_int)]


class TextPart(BaseModel):
    """One part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


def _join_parts(content: object) -> object:
    """Turn a list of text parts into one string; anything else is left to the field's own check."""
    if not isinstance(content, list):
        return content
    if not content:
        raise ValueError("the list of content parts is empty")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only text parts {"type": "text", "text": ...} are supported')
        texts.append(part["text"])
    return "".join(texts)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class ChatMessage(BaseModel):
    """One message of a conversation; list content is joined to one string."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` means the same as `system`."""
    content: Annotated[
        str,
        BeforeValidator(_join_parts, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)]),
    ]
    """What is said: text, or parts of it that are joined."""
    name: str | None = None
    """Taken and left out; the model does not see it."""

    def for_model(self) -> dict[str, str]:
        """The message for a chat template: developer messages are system messages, names are left out."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    include_usage: StrictBool = False
    """Whether one more event, the last, tells the tokens of the whole request."""
    include_obfuscation: StrictBool = False
    """Taken and left alone: nothing is padded."""


class GenerationRequest(BaseModel):
    """What the bodies of chats and completions have in common."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, json_schema_extra={"allOf": [_OPTIONS_OF_A_STREAM]}
    )

    model: str
    """One of the names that `GET /v1/models` lists."""
    stream: StrictBool | None = None
    """Whether the answer comes as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    max_tokens: _Tokens | None = None
    """Most tokens of one choice; the server has a cap of its own."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, strict=True)
    """How far the model may stray from what is likeliest; 0 takes the likeliest token. 1 if left out."""
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, strict=True)
    """Only the likeliest tokens that make up this share are drawn from. 1 if left out."""
    seed: _Seed | None = None
    """The same seed gives the same answer; each further choice has the next one."""
    stop: Annotated[
        list[_Text] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(
            _as_list, json_schema_input_type=_Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)] | None
        ),
    ] = None
    """Texts before which an answer ends."""
    n: _Choices | None = None
    """Choices, for each prompt. 1 if left out."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Parameters that would change the answer and are not implemented, with the values that change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.unsupported:
                if not _is_one_of(value, cls.unsupported[name]):
                    raise PydanticCustomError(
                        "unsupported_parameter",
                        "Unsupported parameter: '{param}' is not supported by this server; leave it out.",
                        {"param": name},
                    )
            elif name not in _WITHOUT_EFFECT:
                raise PydanticCustomError(
                    "unknown_parameter",
                    "Unrecognized request argument supplied: '{param}'.",
                    {"param": name[:200]},
                )
        return kept

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "'stream_options' is only allowed when 'stream' is true.",
                {"param": "stream_options"},
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens that one choice may have, if the request says."""
        return self.max_tokens


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_OPTIONS_OF_A_STREAM, _ONE_LIMIT]})

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    """The conversation so far."""
    max_completion_tokens: _Tokens | None = None
    """The newer name of `max_tokens`; one of the two."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (None,),
        "frequency_penalty": (None, 0),
        "function_call": (None, "none"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "logprobs": (None, False),
        "modalities": (None, ["text"]),
        "parallel_tool_calls": (None, True, False),
        "prediction": (None,),
        "presence_penalty": (None, 0),
        "reasoning_effort": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "store": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
        "web_search_options": (None,),
    }

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "invalid_value",
                "Set one of 'max_tokens' and 'max_completion_tokens', not both.",
                {"param": "max_tokens"},
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens that one choice may have, if the request says."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`: plain text that is continued, without a chat template."""

    prompt: Annotated[
        list[_Text],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(
            _as_list,
            json_schema_input_type=_Text | Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)],
        ),
    ]
    """One text or several."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (None, 1),
        "echo": (None, False),
        "frequency_penalty": (None, 0),
        "logit_bias": (None, {}),
        "logprobs": (None,),
        "presence_penalty": (None, 0),
        "suffix": (None, ""),
    }


class ModerationRequest(BaseModel):
    """Body of `POST /v1/moderations`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    input: Annotated[
        list[str],
        Field(min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(
            _as_list,
            json_schema_input_type=str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)],
        ),
    ]
    """One text or several."""
    model: str | None = None
    """One of the names that `GET /v1/models` lists, or none."""
    role: Literal["prompt", "response", "passage"] = "prompt"
    """What the texts are: a user's request, an answer to one, or text of neither kind."""


def strongest(actions: Sequence[str]) -> str:
    """Return the strongest of `actions`, "allow" if there is none."""
    return max(actions, key=SEVERITY.__getitem__, default="allow")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def guard_block(reports: Mapping[int, SequenceReport], bank: str, policy: str) -> dict[str, Any]:
    """Return the `sailguard` block for the choices in `reports`, keyed by their index.

    Of several choices it holds the strongest action, every verdict with its choice's index, and the
    highest score per domain.
    """
    verdicts = [
        {**verdict.to_dict(), "choice": index} for index, report in reports.items() for verdict in report.verdicts
    ]
    return {
        "action": strongest([report.action for report in reports.values()]),
        "verdicts": verdicts,
        "prompt_scores": _highest([report.prompt_scores for report in reports.values()]),
        "response_scores": _highest([report.response_scores for report in reports.values()]),
        "bank": bank,
        "policy": policy,
    }


def moderation_result(score: TextScore) -> dict[str, Any]:
    """Return one entry of a moderation response's `results`."""
    categories = dict.fromkeys(_CATEGORIES, False)
    category_scores = dict.fromkeys(_CATEGORIES, 0.0)
    for domain, category in _CATEGORY_OF.items():
        categories[category] = bool(score.flagged.get(domain, False))
        category_scores[category] = float(score.scores.get(domain, 0.0))
    # Domains in their usual order; a bank may bring further ones.
    domains: list[str] = [name for name in DOMAINS if name in score.scores]
    domains += [name for name in score.scores if name not in DOMAINS]
    return {
        "flagged": any(score.flagged.values()),
        "categories": categories,
        "category_scores": category_scores,
        "category_applied_input_types": {
            name: ["text"] if name in _CATEGORY_OF.values() else [] for name in _CATEGORIES
        },
        "sailguard": {domain: _domain_block(score, domain) for domain in domains},
        "tokens": score.tokens,
        "truncated": score.truncated,
    }


def _domain_block(score: TextScore, domain: str) -> dict[str, Any]:
    flagged = bool(score.flagged.get(domain, False))
    actions = [verdict.action for verdict in score.verdicts if verdict.domain == domain]
    return {
        "score": float(score.scores[domain]),
        "flagged": flagged,
        "action": strongest([*actions, "flag" if flagged else "allow"]),
        "features": [hit.to_dict() for hit in score.features.get(domain, ())],
    }


def _is_one_of(value: object, known: Sequence[Any]) -> bool:
    # False equals 0 in Python, not on the wire.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def _highest(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    domains = dict.fromkeys(domain for each in scores for domain in each)
    return {domain: max(each[domain] for each in scores if domain in each) for domain in domains}

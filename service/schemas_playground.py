"""Requests and events of `POST /v1/playground`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from service.schemas import MAX_MESSAGES, ChatMessage
from service.schemas_responses import Action, FinishReason, FiredRule

__all__ = ["MAX_STEER", "PlaygroundEvent", "PlaygroundRequest", "event_schema"]

MAX_STEER = 32
_LARGEST_SEED = 2**53 - 1  # beyond it a browser's numbers are not exact

_CHAT_ONLY = ("max_tokens", "temperature", "top_p", "seed", "steer", "compare")
_TEXT_ONLY = ("role",)

Run = Literal["plain", "steered"]
Phase = Literal["prompt", "response"]
Item = Annotated[str, Field(pattern="^[^=]+=.+$", max_length=200)]
Hit = Annotated[list[str | float], Field(min_length=3, max_length=3)]


def _as_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refusal(message: str, param: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{text}", {"text": message, "param": param})


def _needs(needed: str, *names: str) -> list[dict[str, Any]]:
    """Of a JSON schema: whoever gives one of `names` gives `needed`, too."""
    return [{"if": {"required": [name]}, "then": {"required": [needed]}} for name in names]


_COMPARED: dict[str, Any] = {
    "if": {"properties": {"compare": {"const": True}}, "required": ["compare"]},
    "then": {"properties": {"steer": {"minItems": 1}}, "required": ["steer"]},
}


class PlaygroundRequest(BaseModel):
    """Body of `POST /v1/playground`: a chat that is answered, or a text that is judged."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "oneOf": [{"required": ["messages"]}, {"required": ["input"]}],
            "allOf": [*_needs("messages", *_CHAT_ONLY), *_needs("input", *_TEXT_ONLY), _COMPARED],
        },
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = []
    """The conversation so far."""
    max_tokens: Annotated[StrictInt, Field(ge=1), BeforeValidator(_as_int)] = 120
    """Most tokens of an answer; the server has a cap of its own."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, strict=True)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, ge=0.0, le=1.0, strict=True)
    """Only the likeliest tokens that make up this share are drawn from."""
    seed: Annotated[StrictInt, Field(ge=0, le=_LARGEST_SEED), BeforeValidator(_as_int)] | None = None
    """The same seed gives the same answer; left out, one is drawn where one is needed."""
    steer: Annotated[list[Item], Field(max_length=MAX_STEER)] = []
    """What steers the answer: `TARGET=STRENGTH`, `TARGET=clamp:VALUE` or `TARGET=ablate`, with a domain, a concept or a
    feature's id as target."""
    compare: StrictBool = False
    """Whether the answer without steering is generated beside it; only with `steer`."""
    input: str = ""
    """A text that is judged, in place of a chat."""
    role: Literal["prompt", "response", "passage"] = "prompt"
    """What the text is: a user's message, an answer, or text on its own."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat; else `input` is to be judged."""
        return "messages" in self.model_fields_set

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = self.model_fields_set
        chat = self.is_chat
        if chat == ("input" in given):
            raise _refusal("Set one of 'messages' and 'input'.", "messages")
        for name in _TEXT_ONLY if chat else _CHAT_ONLY:
            if name in given:
                raise _refusal(f"'{name}' goes with '{'input' if chat else 'messages'}' alone; leave it out.", name)
        if self.compare and not self.steer:
            raise _refusal("'compare' needs 'steer': without it both answers would be the same.", "compare")
        return self


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class PlaygroundToken(_Event):
    """One token, and what the guard saw of it. Names are short: there may be thousands."""

    i: int
    """Its place, as `token_index` of verdicts counts."""
    t: str
    """Its text; those of all tokens make up the text, so that a token which ends within a character has none."""
    o: bool
    """Whether it was judged; what the chat template adds is not."""
    g: int | None
    """The number of its message; windows do not cross from one to another."""
    s: list[float]
    """The domains' probabilities at this token, in the order of `domains`; empty if it was not judged."""
    f: list[Hit]
    """Every active feature, strongest first: its id, its activation, and what it adds to a domain's logit."""


class PlaygroundStart(_Event):
    """The first event."""

    type: Literal["start"]
    id: str
    """The request's id, as the audit and the log have it."""
    model: str
    bank: str
    policy: str
    seed: int | None
    runs: list[Run]
    domains: list[str]
    mode: Literal["chat", "text"]


class PlaygroundTokens(_Event):
    """The next tokens of one run."""

    type: Literal["tokens"]
    run: Run
    phase: Phase
    tokens: list[PlaygroundToken]


class PlaygroundRule(_Event):
    """A verdict, in its place among the tokens."""

    type: Literal["verdict"]
    run: Run
    verdict: FiredRule


class PlaygroundCounts(_Event):
    """Tokens of a run."""

    prompt: int
    response: int


class PlaygroundEnd(_Event):
    """One run is complete."""

    type: Literal["end"]
    run: Run
    finish_reason: FinishReason
    action: Action
    prompt_scores: dict[str, float]
    response_scores: dict[str, float]
    refusal: str | None
    """After a block, what is said in place of the answer."""
    tokens: PlaygroundCounts
    truncated: bool
    """Whether the text was too long, and only its beginning was judged."""


class PlaygroundError(_Event):
    """It could not be completed; nothing follows."""

    type: Literal["error"]
    message: str
    code: str | None


class PlaygroundDone(_Event):
    """All runs are complete; the last event."""

    type: Literal["done"]


class PlaygroundEvent(
    RootModel[
        Annotated[
            PlaygroundStart | PlaygroundTokens | PlaygroundRule | PlaygroundEnd | PlaygroundError | PlaygroundDone,
            Field(discriminator="type"),
        ]
    ]
):
    """One event of `POST /v1/playground`."""


def event_schema() -> dict[str, Any]:
    """The JSON schema of an event, all in one piece: nothing else of the OpenAPI document refers to its parts."""
    schema = PlaygroundEvent.model_json_schema()
    parts = schema.pop("$defs")

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(below) for below in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            part = {**parts[part["$ref"].rpartition("/")[2]], **{k: v for k, v in part.items() if k != "$ref"}}
        return {name: whole(below) for name, below in part.items() if name != "discriminator"}

    found: dict[str, Any] = whole(schema)
    return found

"""Every text in a request or an answer of OpenAI's shape, whatever field it stands in.

What the upstream may show its model has to be judged, known to this server or not: a field's name tells little, and
some servers read `Messages` as they read `messages`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import ApiError

if TYPE_CHECKING:
    from feature_bank.layout import Role

__all__ = ["Asked", "answer_texts", "joined", "read_chat", "read_completion"]

_MOST_TEXTS = 1024
_MOST_CHOICES = 128
_LONGEST_NAME = 64

# Fields whose value is a name or an id; what is longer than any such is judged all the same.
_NAMES = frozenset({"role", "type", "id", "tool_call_id", "call_id", "finish_reason", "index"})
# Fields of a request that no model gets to see.
_UNSEEN = frozenset(
    {
        "metadata",
        "modalities",
        "model",
        "prompt_cache_key",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "stream",
        "stream_options",
        "tool_choice",
        "user",
        "verbosity",
    }
)
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
_ENCODED = frozenset({"arguments", "input"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a request asks of the upstream."""

    body: dict[str, Any]
    model: str
    texts: tuple[str, ...]
    """What is to be judged before the upstream sees it."""
    roles: tuple[Role, ...]
    choices: int
    """Choices that the answer will have."""
    streams: bool
    include_usage: bool


def read_chat(body: object) -> Asked:
    """The request of `POST /v1/chat/completions`. Raises `ApiError` (400) for what cannot be judged."""
    fields = _fields(body)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages", "it has to be a list of messages")
    texts: list[tuple[str, Role]] = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid(place, "it has to be an object with a 'role'")
        role: Role = "response" if message["role"] == "assistant" else "prompt"
        texts.append((_content(message.get("content"), f"{place}.content"), role))
        texts.append((joined(message, without={"content"}), role))
    return _asked(fields, texts, without={"messages"}, prompts=1)


def read_completion(body: object) -> Asked:
    """The request of `POST /v1/completions`. Raises `ApiError` (400) for what cannot be judged."""
    fields = _fields(body)
    prompt = fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    texts: list[tuple[str, Role]] = [(text, "prompt") for text in prompts if isinstance(text, str)]
    if not prompts or len(texts) < len(prompts):
        raise _invalid("prompt", "it has to be a text or a list of texts: token ids cannot be judged")
    return _asked(fields, texts, without={"prompt"}, prompts=len(prompts))


def answer_texts(choice: Mapping[str, Any]) -> list[str]:
    """The texts of one choice of a whole answer: of each field of its message, and of what else it holds.

    `logprobs` are left out: they say the same again, and what else the model could have said.
    """
    message = choice.get("message")
    parts = dict(message) if isinstance(message, dict) else {}
    texts = [joined({name: value}) for name, value in parts.items()]
    texts.append(joined(choice, without={"message", "logprobs"}))
    return [text for text in texts if text.strip()]


def joined(value: object, *, without: Collection[str] = ()) -> str:
    """All strings below `value`, one a line, but for names and ids; `without`: fields of `value` that are left out."""
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if name not in without}
    return "\n".join(text for text in _strings(value) if text.strip())


def _strings(value: object) -> Iterator[str]:
    waiting: list[tuple[str, object]] = [("", value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, dict):
            waiting += reversed([(str(inner), below) for inner, below in item.items()])
        elif isinstance(item, list):
            waiting += [(name, below) for below in reversed(item)]
        elif isinstance(item, str) and not (name in _NAMES and len(item) <= _LONGEST_NAME):
            decoded = _decoded(item) if name in _ENCODED else None
            if decoded is None:
                yield item
            else:
                waiting.append(("", decoded))


def _decoded(text: str) -> list[Any] | None:
    """Arguments of a tool are JSON in a string, in which escapes could hide what they say."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    # An argument's name is the model's own words, too.
    return [[name, inner] for name, inner in value.items()] if isinstance(value, dict) else None


def _content(content: object, place: str) -> str:
    """The text of a message. Raises `ApiError` (400) for parts that are none."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _invalid(place, "it has to be a text or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise _invalid(f"{place}[{number}]", "only text can be judged, so that only text parts are let through")
        texts += _strings({name: value for name, value in part.items() if name != "cache_control"})
    return "".join(texts)


def _asked(fields: dict[str, Any], texts: list[tuple[str, Role]], *, without: Collection[str], prompts: int) -> Asked:
    if fields.get("modalities") not in (None, ["text"]):
        raise _invalid("modalities", "only text can be judged, so that nothing else can be asked for")
    if fields.get("prompt_embeds") is not None:
        raise _invalid("prompt_embeds", "only text can be judged")
    texts.append((joined(fields, without={*_UNSEEN, *without}), "prompt"))
    texts = [(text, role) for text, role in texts if text.strip()]
    if len(texts) > _MOST_TEXTS:
        raise ApiError(400, f"The request holds {len(texts)} texts; at most {_MOST_TEXTS} are judged in one request.")
    number = fields.get("n")
    choices = number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else 1
    if choices * prompts > _MOST_CHOICES:
        raise _invalid("n", f"at most {_MOST_CHOICES} choices can be asked for in one request")
    options = fields.get("stream_options")
    return Asked(
        body=fields,
        model=str(fields.get("model", ""))[:200],
        texts=tuple(text for text, _ in texts),
        roles=tuple(role for _, role in texts),
        choices=choices * prompts,
        streams=bool(fields.get("stream")),
        include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
    )


def _fields(body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, "The request body has to be a JSON object.", code="invalid_value")
    return body


def _invalid(param: str, problem: str) -> ApiError:
    return ApiError(400, f"{param}: {problem}.", param=param, code="invalid_value")

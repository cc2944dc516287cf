"""What is asked of a chat endpoint and what came back, and the replies kept on disk so that none is paid for twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeGuard

from feature_bank.atomic import atomic_file

Status = Literal["answered", "refused", "not_asked"]

TEMPERATURE = 0
_MESSAGE_TOKENS = 8
# A word of up to seven letters, a digit, any other sign and a line break each count as one token: a little more than
# the tokenizers of common chat models make of English, and about as many as they make of Chinese.
_PIECE = re.compile(r"[A-Za-z]{1,7}|[^\sA-Za-z]|\n")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer; rather too many than too few."""
    return sum(1 for _ in _PIECE.finditer(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One question: chat messages, and how many tokens its answer may have."""

    messages: Sequence[Mapping[str, str]]
    max_answer: int

    def key(self, model: str) -> str:
        """Names the question whatever server it is put to: SHA-256 of model, messages and parameters."""
        asked = {
            "model": model,
            "messages": self.payload(),
            "temperature": TEMPERATURE,
            "max_tokens": self.max_answer,
            "format": "json",
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def payload(self) -> list[dict[str, str]]:
        """The messages as they are sent; what UTF-8 cannot carry is replaced."""
        return [
            {name: value.encode("utf-8", "replace").decode() for name, value in message.items()}
            for message in self.messages
        ]

    def prompt_tokens(self) -> int:
        """An estimate."""
        return sum(_MESSAGE_TOKENS + estimate_tokens(message["content"]) for message in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    """What came of one question."""

    status: Status
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    """The server reported no usage, so that the two counts are estimates."""
    cached: bool = False

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


class Answerer(Protocol):
    """Whoever answers questions: an endpoint, or what stands between it and those who share it."""

    @property
    def model(self) -> str:
        """The name of the model that answers."""
        ...

    def ask_all(
        self, requests: Sequence[ChatRequest], *, report: Callable[[int, int], None] | None = None
    ) -> list[ChatReply]:
        """The replies, in the order of the requests; `report(done, total)` is called now and then."""
        ...


class ReplyCache:
    """A folder with one file a reply, named by the question's key. The question itself is not written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of one reply."""
        return self.folder / key[:2] / f"{key}.json"

    def load(self, key: str) -> ChatReply | None:
        """The reply, or None if there is none or its file is damaged: then it is asked for again."""
        try:
            found = json.loads(self.path(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            return None
        prompt, completion = found.get("prompt_tokens"), found.get("completion_tokens")
        if not is_count(prompt) or not is_count(completion):
            return None
        return ChatReply(
            status="answered",
            text=found["text"],
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=found.get("estimated") is True,
            cached=True,
        )

    def save(self, key: str, reply: ChatReply, model: str) -> None:
        """Write a reply, whole or not at all."""
        record = {
            "model": model,
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "estimated": reply.estimated,
        }
        with atomic_file(self.path(key)) as file:
            file.write_text(json.dumps(record) + "\n", encoding="ascii")


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value read from JSON is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

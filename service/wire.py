"""Chats and completions as they stand on the wire, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ChatWire", "TextWire", "Wire"]


class Wire(ABC):
    """The shape of one answer; every chunk of it has the same head."""

    prefix: str
    whole_name: str
    chunk_name: str

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, index: int) -> dict[str, Any] | None:  # noqa: ARG002 - a completion begins with its text
        """What comes before the first text of a choice, if anything does."""
        return None

    @abstractmethod
    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice in a chunk with more text."""

    @abstractmethod
    def ending(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The choice in its last chunk."""

    @abstractmethod
    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """The choice in a whole answer."""

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_name, "choices": list(choices), **more}

    def whole(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A whole answer."""
        return {**self._head, "object": self.whole_name, "choices": list(choices), **more}


class ChatWire(Wire):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """The choice's role."""
        return self._part(index, {"role": "assistant", "content": ""}, None)

    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice with more content."""
        return self._part(index, {"content": text}, None)

    def ending(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The choice without content, and why it ended."""
        return self._part(index, {}, finish_reason)

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """The choice as a message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    @staticmethod
    def _part(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class TextWire(Wire):
    """`/v1/completions`."""

    prefix = "cmpl"
    whole_name = chunk_name = "text_completion"

    def delta(self, index: int, text: str) -> dict[str, Any]:
        """The choice with more text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def ending(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The choice without text, and why it ended."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        """The choice as text."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

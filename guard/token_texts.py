"""The text of every token, such that put together they are the text.

A token may end within a character: many tokenizers cut rare ones into bytes. Decoded alone it would be U+FFFD, so its
text is empty, and that of the token which completes the character is the character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TokenTexts", "token_texts"]

_BROKEN = "\ufffd"
_MOST = 8  # tokens that wait for each other
_CHARACTER = 4  # tokens that one character can be cut into: its bytes


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each of `ids`. decode: the text of several; it may depend on what stands before a token."""
    texts = TokenTexts(decode)
    found = [text for token in ids for text in texts.push(token)]
    return found + texts.flush()


class TokenTexts:
    """The texts of tokens that come one by one. U+FFFD that stands in the text itself is told from half a character
    by what comes next."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # tokens before those that wait: a decoder may look at them
        self._before = ""
        self._ids: list[int] = []
        self._after: list[str] = []  # the text of the context and the waiting tokens, up to each of these

    def push(self, token: int) -> list[str]:
        """Take one token. Returns the texts that are certain now, from the first token that had to wait on."""
        self._ids.append(token)
        text = self._decode(self._context + self._ids)
        self._after.append(text)
        if not text.endswith(_BROKEN):
            return self._settle(len(self._ids))
        if len(self._ids) < _MOST:
            return []
        # Of as many tokens as a character has at most, one ends a character, unless the bytes are no text at all.
        latest = _MOST - _CHARACTER
        ends = range(latest, latest - _CHARACTER, -1)
        return self._settle(next((n for n in ends if text.startswith(self._after[n - 1])), latest))

    def flush(self) -> list[str]:
        """The texts of the tokens that wait, when none will come after them."""
        return self._settle(len(self._ids)) if self._ids else []

    def _settle(self, n: int) -> list[str]:
        """The texts of the first n waiting tokens."""
        whole, start, texts = self._after[-1], len(self._before), []
        for after in self._after[: n - 1]:  # how much of it has stayed what it was
            end = max(start, _in_common(after, whole))
            texts.append(whole[start:end])
            start = end
        end = len(whole if n == len(self._ids) else self._after[n - 1])
        texts.append(whole[start:end])
        self._context, self._ids = self._ids[:n], self._ids[n:]
        self._before = self._decode(self._context)
        self._after = [self._decode(self._context + self._ids[: i + 1]) for i in range(len(self._ids))]
        return texts


def _in_common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))

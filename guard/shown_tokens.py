"""Which tokens of an answer its reader may be told of: those whose text has been shown, each once, in order.

A token is judged before its text may be shown, and the text of one that a rule stopped, or that a stop sequence cut
off, never is. What the guard saw of it waits here until then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from guard.events import TraceToken

if TYPE_CHECKING:
    from guard.engines.requests import Observer

__all__ = ["ShownTokens"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ShownTokens:
    """Takes what the guard sees of one answer, as its observer, and passes on what may be told.

    The prompt, which its sender knows, is told with the first that is heard of the answer. An observer that raises is
    told no more.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer: Observer | None = observer
        self._prompt: Sequence[TraceToken] | None = None
        self._seen: list[TraceToken] = []
        self._told = 0
        self._room = 0  # characters that have been shown of tokens that have not been told

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        """Take the prompt."""
        self._prompt = tokens

    def token(self, token: TraceToken) -> None:
        """Take the answer's next token, which has been judged."""
        self._seen.append(token)

    def show(self, text: str, pieces: Sequence[str], *, last: bool = False) -> None:
        """Tell of the tokens that are complete with this further text of the answer.

        pieces: the texts of all its tokens so far, as far as they are known. A token without text of its own goes with
        the next one that has some. last: no more will be shown; of a token that a stop sequence cuts, the text before
        it is told.
        """
        if self._prompt is not None:
            self._tell(lambda observer, tokens: observer.prompt(tokens), self._prompt)
            self._prompt = None
        self._room += len(text)
        while (next_text := self._next_text(pieces)) is not None and len(pieces[next_text]) <= self._room:
            self._room -= len(pieces[next_text])
            self._tell_up_to(next_text + 1, pieces)
        if not last:
            return
        if next_text is None:
            self._tell_up_to(len(pieces), pieces)
        elif self._room:
            self._tell_up_to(next_text + 1, [*pieces[:next_text], pieces[next_text][: self._room]])

    def _next_text(self, pieces: Sequence[str]) -> int | None:
        """Which token that was not told is the first with text; None if there is none."""
        return next((i for i in range(self._told, len(pieces)) if pieces[i]), None)

    def _tell_up_to(self, stop: int, pieces: Sequence[str]) -> None:
        for token, piece in zip(self._seen[self._told : stop], pieces[self._told : stop], strict=False):
            self._tell(lambda observer, known: observer.token(known), replace(token, text=piece))
        self._told = stop

    def _tell(self, tell: Callable[[Observer, T], None], what: T) -> None:
        if self._observer is None:
            return
        try:
            tell(self._observer, what)
        except Exception as error:  # its reader's mistake must not end the model's thread
            self._observer = None
            logger.error("an answer is traced no further: %s", type(error).__name__, exc_info=error)

"""Judging an answer that grows as text: how it becomes tokens, and how much of it may be shown.

What is found does not depend on how the text is cut into pushes. The text is tokenised word by word, a word once it is
over: what follows can no longer change its tokens. Each token is read with a left context that its place alone decides
(see `guard.engines.onnx_windows`), and judged as the guard judges a response that a model streams.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from feature_bank.layout import clean
from feature_bank.spool_acts import Acts
from guard.engines.onnx_tokens import FileTokenizer
from guard.engines.onnx_windows import Passage
from guard.errors import GuardError
from guard.events import SequenceReport, Verdict
from guard.judge import Floats
from guard.reports import make_report
from guard.seen_tokens import SeenTokens
from guard.stream_judge import StreamJudge

_WORD_START = re.compile(r"(?<=\S) (?=\S)")
_LONGEST = 64  # characters of a word; a longer one, or text without spaces, is cut
_LEAD = "a"  # stands before a space, so that it is tokenised as inside a text and not as its beginning


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What a push of text has led to."""

    text: str
    """What may be shown now: all of it has been judged, and it stands before any token that was blocked."""
    verdicts: tuple[Verdict, ...]
    """The rules that have fired since the last push."""
    blocked: bool
    """Whether the answer ends here."""


class ResponseJudge:
    """One answer as it comes. A push waits until `step_tokens` tokens can be read at once.

    The first text is released when as many tokens have been judged as the slowest blocking rule needs
    (`StreamJudge.hold_tokens`), so that of a short answer that is blocked nothing is seen.
    """

    def __init__(
        self,
        judge: StreamJudge,
        tokenizer: FileTokenizer,
        head: Sequence[int],
        read: Callable[[Sequence[Passage]], list[Floats]],
        *,
        request_id: str,
        step_tokens: int,
        keep: bool = False,
    ) -> None:
        self._judge = judge
        self._seen = SeenTokens() if keep else None
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._head = list(head)
        self._read = read
        self._step_tokens = step_tokens
        self._state = judge.begin([request_id])
        self._text = ""
        self._cut = 0  # characters of the text that have been cut into words
        self._shown = 0
        self._ids: list[int] = []
        self._starts: list[int] = []  # of each token, the first character that it stands for
        self._judged = 0  # tokens that have been read
        self._carry = ""
        self._ended = False

    def push(self, text: str, *, last: bool = False) -> Released:
        """Take more of the answer; `last`: it ends with this, and all of it is released or blocked.

        After a block nothing more is judged or released. Raises GuardError if the answer has ended before, or if the
        activations are not numbers.
        """
        return push_all(self._read, [(self, text, last)])[0]

    def report(self) -> SequenceReport:
        """What has been found so far."""
        self._state.generated[0] = self._state.observed[0]
        return make_report(self._judge, self._state, 0)

    def seen(self) -> Acts | None:
        """What was seen of its tokens, up to the one that decided; None unless that is kept."""
        return None if self._seen is None else self._seen.response()

    def feed(self, text: str, last: bool) -> Passage | None:
        """Take text in; returns what is to be read now. The steps of a push, for those who read several at once."""
        if self._ended and not self._state.blocked[0]:
            raise GuardError("this answer has ended; open another one")
        self._ended = last
        if self._state.blocked[0]:
            return None
        text, self._carry = self._carry + text, ""
        if not last and "\ud800" <= text[-1:] <= "\udbff":  # one half of a character
            text, self._carry = text[:-1], text[-1]
        self._text += clean(text)
        for start, stop in self._words(last):
            self._tokenise(start, stop)
        waiting = len(self._ids) - self._judged
        if not waiting or (waiting < self._step_tokens and not last):
            return None
        return Passage(self._head, self._ids, self._judged)

    def take(self, acts: Floats) -> list[Verdict]:
        """Judge the activations of what was to be read."""
        fired: list[Verdict] = []
        judge, state, first = self._judge, self._state, self._judged
        for number, token in enumerate(self._ids[first:], len(acts) - (len(self._ids) - first)):
            if token not in self._special:
                if self._seen is not None:
                    self._seen.token(acts[number])
                fired += [verdict for _, verdict in judge.observe_step(state, acts[number : number + 1])]
                if state.blocked[0]:
                    break
            self._judged += 1
        state.released.clear()
        return fired

    def release(self, fired: list[Verdict]) -> Released:
        """What may be shown after `take`; the rules that count at an answer's end are applied to one that ends."""
        state, whole = self._state, self._judged == len(self._ids)
        if self._ended and whole and not state.blocked[0]:
            fired = fired + [verdict for _, verdict in self._judge.finish(state)]
        blocked = state.blocked[0]
        seen = state.observed[0] - blocked
        safe = self._shown
        if blocked and not whole and seen >= self._judge.hold_tokens:
            safe = self._starts[self._judged]
        elif not blocked and self._ended:
            safe = len(self._text)
        elif not blocked and whole and seen >= self._judge.hold_tokens:
            safe = self._cut
        text, self._shown = self._text[self._shown : safe], max(self._shown, safe)
        return Released(text=text, verdicts=tuple(fired), blocked=blocked)

    def _words(self, last: bool) -> Iterator[tuple[int, int]]:
        """Where the words lie that are over: up to the space before the next one. What comes later moves none of it."""
        text, start = self._text, self._cut
        while True:
            found = _WORD_START.search(text, start + 1, start + _LONGEST + 2)
            if found is not None:
                stop = found.start()
            elif len(text) >= start + _LONGEST + 2:
                stop = start + _LONGEST
            elif last and start < len(text):
                stop = len(text)
            else:
                break
            yield start, stop
            start = self._cut = stop

    def _tokenise(self, start: int, stop: int) -> None:
        word = self._text[start:stop]
        lead = _LEAD if word[0] == " " else ""
        spans = self._tokenizer.spans(lead + word)
        if lead and (not spans or spans[0][1] != (0, 1)):
            lead, spans = "", self._tokenizer.spans(word)
        for token, (first, _) in spans[len(lead) :]:
            self._ids.append(token)
            self._starts.append(start + first - len(lead))


def push_all(
    read: Callable[[Sequence[Passage]], list[Floats]], pushes: Sequence[tuple[ResponseJudge, str, bool]]
) -> list[Released]:
    """Push (judge, text, last) to several answers, each at most once, and read all of them together."""
    wanted = [judge.feed(text, last) for judge, text, last in pushes]
    found = iter(read([passage for passage in wanted if passage is not None]))
    return [
        judge.release([] if passage is None else judge.take(next(found)))
        for (judge, _, _), passage in zip(pushes, wanted, strict=True)
    ]

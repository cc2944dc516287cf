"""One request of continuous batching under guard: what of it has been read, what steers it, what it may emit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from guard.engines.decoding import Sampler
from guard.engines.judging import Judging
from guard.errors import GuardError, UnsupportedGenerationError
from guard.events import SequenceReport, TraceToken, Verdict
from guard.judge import Floats
from guard.rules import BoundRule
from guard.state import BatchState
from guard.steering import Steering


class Listener(Protocol):
    """Who is told of one request's tokens, in place of the manager's queue. Called while the model waits."""

    def advance(self, tokens: Sequence[int], verdicts: Sequence[Verdict], may_show: bool) -> bool:
        """The judged tokens of the answer so far, and all verdicts. Returns whether the answer is to end with them."""

    def end(self, tokens: Sequence[int], ended: bool, report: SequenceReport, error: str | None) -> None:
        """The whole answer, judged; ended: by itself. error: why the manager could not go on with it."""


class Observer(Protocol):
    """Who is told what the guard sees of one request's tokens, as soon as it has judged them. Called while the model
    waits; one that raises is not called again."""

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        """All tokens of the prompt, those of the template among them; these are not observed."""

    def token(self, token: TraceToken) -> None:
        """The next token of the answer. Its text is left empty, and its index counts the tokens that are judged."""


class Keeper(Protocol):
    """Who is given the activations of one request's judged tokens, shown or not: cheaper than an `Observer`, which is
    told what they mean. Called while the model waits; one that raises is not called again."""

    def prompt(self, segments: npt.NDArray[np.int64], acts: Floats) -> None:
        """The segments (k,) and activations (k, F) of the prompt's judged tokens."""

    def token(self, acts: Floats) -> None:
        """The activations (F,) of the answer's next judged token; they are only lent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """How one request is guarded and whom it answers to."""

    judging: Judging
    sampler: Sampler | None = None
    """Chooses its tokens in the manager's place; None leaves them to the manager."""
    listener: Listener | None = None
    steer: tuple[BoundRule, ...] = ()
    """What steers it from the token on that chooses the first of its answer; rules that fire come on top."""
    observer: Observer | None = None
    keeper: Keeper | None = None


class Request:
    """A request from the moment it is added. Its state exists from its first forward pass on.

    A position is a token's place in the request's sequence: its prompt, then its answer. Whatever passes the scheduler
    cuts the sequence into, a position is judged when it is read for the first time. A request whose cache was taken
    away is read again from the start; what was judged is not judged twice, and is steered as it was.
    """

    def __init__(
        self,
        request_id: str,
        guarded: Guarded,
        *,
        number: int,
        prompt: Sequence[int],
        limit: int | None,
        ends: Sequence[int],
        end: int,
    ) -> None:
        self.request_id = request_id
        self.judging = guarded.judging
        self.sampler = guarded.sampler
        self.listener = guarded.listener
        self.observer = guarded.observer
        self.keeper = guarded.keeper
        self.number = number
        """Its place among the requests, in the order in which they were added."""
        self.prompt = list(prompt)
        self.limit = limit
        """Most tokens of an answer; None if there is no limit."""
        self.ends = frozenset(ends)
        self.end = end
        """The token that is left to it when it is stopped."""
        self.ids: list[int] = []
        """The tokens that forward passes have read, from the first of the prompt on."""
        self.shown = 0
        """Tokens of the answer that a reader of its stream has been given."""
        self.state: BatchState | None = None
        self._chunks: list[Mapping[str, Tensor]] = []
        self._in_force: dict[str, BoundRule] = {}
        self._steer = guarded.steer
        self._steered: list[tuple[int, Steering | None]] = []  # from which position on, in order
        if self._steer:  # made by whoever adds it: an error would end the manager's thread
            self._steered.append((len(self.prompt) - 1, self._steering()))

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer that have been read; all of them judged but special tokens."""
        return self.ids[len(self.prompt) :]

    @property
    def blocked(self) -> bool:
        """Whether it is to be stopped."""
        return self.state is not None and self.state.blocked[0]

    def begin(self) -> BatchState:
        """Its state, made if this is its first pass."""
        if self.state is None:
            self.state = self.judging.monitor.begin((self.request_id,))
        return self.state

    def unread(self, position: int, ids: Sequence[int]) -> int:
        """How many of the tokens `ids`, which stand from `position` on, were read by an earlier pass.

        Raises UnsupportedGenerationError if tokens before them have never been read (a cache that is shared between
        requests holds them), if they are not those of this request, or if more than one is of the answer and new.
        """
        if position > len(self.ids):
            raise UnsupportedGenerationError(
                f"request {self.request_id}: the tokens from {len(self.ids)} to {position - 1} of its prompt came from "
                "a cache and were not computed, so they cannot be judged; set allow_block_sharing=False"
            )
        if position >= len(self.prompt) and len(ids) == 1 and position == len(self.ids):
            return 0  # the usual case: the last token that was generated
        again = min(len(self.ids) - position, len(ids))
        known = [*self.prompt, *self.answer]
        expected = known[position : position + len(ids)]
        if expected != list(ids[: len(expected)]):
            raise UnsupportedGenerationError(f"request {self.request_id}: a forward pass reads tokens that are not its")
        if position + len(ids) - max(len(self.ids), len(self.prompt)) > 1:
            raise UnsupportedGenerationError(
                f"request {self.request_id}: several tokens of the answer came in one pass; the guard judges one at a "
                "time"
            )
        return again

    def prompt_part(self, hidden: Mapping[str, Float[Tensor, "n d_in"]]) -> dict[str, Tensor] | None:
        """Take the activations of a part of the prompt that was not read before. Returns those of the whole prompt
        once it is complete.

        Raises GuardError if a part is missing, because the guard failed when it was read.
        """
        (n,) = {x.shape[0] for x in hidden.values()}
        if len(self.ids) + n < len(self.prompt):
            self._chunks.append({name: x.clone() for name, x in hidden.items()})  # the pass's own tensors are dropped
            return None
        chunks, self._chunks = [*self._chunks, hidden], []
        whole = {name: torch.cat([chunk[name] for chunk in chunks]) for name in hidden}
        if any(x.shape[0] != len(self.prompt) for x in whole.values()):
            raise GuardError(f"request {self.request_id}: a part of its prompt was not seen, so it cannot be judged")
        return whole

    # ---- steering ----------------------------------------------------------------------------------------

    def act(self, verdicts: Sequence[Verdict], position: int) -> None:
        """Let go of the rules that the last token released and put into force those that fired, from `position` on."""
        assert self.state is not None
        before = dict(self._in_force)
        for _, label in self.state.released:
            self._in_force.pop(label, None)
        self.state.released.clear()
        for verdict in verdicts:
            if verdict.action == "steer":
                self._in_force.setdefault(verdict.rule, self.judging.bound[verdict.rule])
        if self._in_force.keys() == before.keys():
            return
        self._steered.append((position, self._steering()))

    def _steering(self) -> Steering | None:
        """What is in force now: what the request brought with it, and the rules that have fired."""
        rules = (*self._steer, *self._in_force.values())
        if not rules:
            return None
        monitor = self.judging.monitor
        steering = Steering(monitor.bank, monitor.encoder, 1)
        for rule in rules:  # where two clamp one feature, the later one counts: the policy's
            steering.steer(0, rule)
        return steering

    def steered(self, position: int, n: int) -> Iterator[tuple[slice, Steering]]:
        """What steers the n tokens from `position` on: slices of them, counted from 0, and what steers each slice."""
        stops = [start for start, _ in self._steered[1:]]
        for (start, steering), stop in zip(self._steered, [*stops, position + n], strict=False):
            first, last = max(start, position) - position, min(stop, position + n) - position
            if steering is not None and first < last:
                yield slice(first, last), steering

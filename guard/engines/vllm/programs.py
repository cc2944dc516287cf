"""What steers which rows of a forward pass: programs, each a set of rules in force, and the rows that run them.

Requests of one batch may be steered differently, and one request differently at different positions. A program is a
row of the steering's tables; requests with the same rules in force share it. Every rank of a tensor-parallel model
keeps the same programs, for it is told the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Bank
from guard.encoder import SelectedEncoder
from guard.errors import GuardError
from guard.rules import BoundRule
from guard.steering import Steering

RuleKey = tuple[str, str]
"""(policy or tenant, rule's label), by which every process finds the same rule."""


class Batch(NamedTuple):
    """The n requests of a forward pass of T tokens, whose rows stand one after another."""

    request_ids: list[str]
    edges: npt.NDArray[np.integer[Any]]
    """(n + 1,): request i has the rows from edges[i] to edges[i + 1] - 1."""
    first: npt.NDArray[np.integer[Any]]
    """(n,): the place of each request's first row in its sequence."""
    ids: npt.NDArray[np.integer[Any]]
    """(T,): the tokens."""


class Programs:
    """At most `capacity` programs at a time; the rows of a pass that run one."""

    def __init__(
        self,
        bank: Bank,
        encoder: SelectedEncoder,
        find: Callable[[RuleKey], BoundRule],
        *,
        rows: int,
        capacity: int,
    ) -> None:
        device = encoder.scale.device
        self._find = find
        self._captured = device.type != "cpu"  # there all rows are computed alike, as a graph replays them
        self._steering = Steering(bank, encoder, capacity + 1, fixed=self._captured)
        self._program: dict[frozenset[RuleKey], int] = {frozenset(): 0}
        self._users: Counter[int] = Counter()
        self._free = list(range(capacity, 0, -1))
        self._timeline: dict[str, list[tuple[int, int]]] = {}  # of each request: from which position on, which program
        self._row_program = torch.zeros(rows, dtype=torch.int64, device=device)
        self._rows: Tensor | None = None
        self._placed = False
        self.log: list[tuple[str, int]] | None = None
        """If a list is put here, the (request, position) of every row that is steered is added to it."""

    @property
    def requests(self) -> frozenset[str]:
        """The requests that are or were steered and have not ended."""
        return frozenset(self._timeline)

    def change(self, request_id: str, position: int, keys: Iterable[RuleKey]) -> None:
        """From a position of a request on exactly these rules are in force.

        Raises GuardError if no program is left.
        """
        wanted = frozenset(keys)
        if wanted not in self._program:
            if not self._free:
                raise GuardError(
                    f"request {request_id} needs one more combination of steering rules than the "
                    f"{len(self._program) - 1} that there is room for at a time; raise SAILGUARD_STEERING_PROGRAMS"
                )
            rules = [self._find(key) for key in sorted(wanted)]
            self._program[wanted] = self._free.pop()
            for rule in rules:
                self._steering.steer(self._program[wanted], rule)
        number = self._program[wanted]
        self._users[number] += 1
        self._timeline.setdefault(request_id, []).append((position, number))

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have ended."""
        for request_id in request_ids:
            for _, number in self._timeline.pop(request_id, ()):
                self._users[number] -= 1
                if number and not self._users[number]:
                    self._steering.clear(number)
                    self._program = {keys: n for keys, n in self._program.items() if n != number}
                    self._free.append(number)

    def place(self, batch: Batch) -> None:
        """Say which rows of the coming pass run which program."""
        rows: list[int] = []
        numbers: list[int] = []
        for i, request_id in enumerate(batch.request_ids) if self._timeline else ():
            timeline = self._timeline.get(request_id)
            if timeline is None:
                continue
            starts = [start for start, _ in timeline]
            for row in range(batch.edges[i], batch.edges[i + 1]):
                position = int(batch.first[i]) + row - int(batch.edges[i])
                at = bisect_right(starts, position) - 1
                number = timeline[at][1] if at >= 0 else 0
                if number:
                    rows.append(row)
                    numbers.append(number)
                    if self.log is not None:
                        self.log.append((request_id, position))
        if rows or self._placed:
            self._row_program.zero_()
        self._placed = bool(rows)
        self._rows = torch.tensor(rows, device=self._row_program.device) if rows else None
        if rows:
            self._row_program[self._rows] = torch.tensor(numbers, device=self._row_program.device)

    def done(self) -> None:
        """The pass is over: another, that no batch was placed for, steers nothing."""
        self._rows = None

    def steer(self, name: str, hidden: Float[Tensor, "n d_in"], seen: Float[Tensor, "n d_in"]) -> None:
        """Change the rows of `hidden` that run a program. seen: the activations that `hidden` is, or is a part of.

        All other rows keep their bits.
        """
        if self._captured:
            number = self._row_program[: hidden.shape[0]]
            changed = (hidden.float() + self._steering.change(name, seen, number)).to(hidden.dtype)
            hidden.copy_(torch.where((number > 0)[:, None], changed, hidden))
        elif self._rows is not None:
            delta = self._steering.change(name, seen[self._rows], self._row_program[self._rows])
            hidden[self._rows] = (hidden[self._rows].float() + delta).to(hidden.dtype)

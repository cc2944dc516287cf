"""Per-sequence memory of the guard. It belongs to the sequences of one batch and is dropped with them.

What a step decides with are a few numbers a sequence and domain: they lie in NumPy, where an operation on so little
costs a fraction of what one on the model's device does. Only the features' own history stays there, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from guard.events import Verdict

if TYPE_CHECKING:
    import torch

ROOM = 256  # tokens a row that a fresh state has room for; it doubles when they are spent


@dataclass(kw_only=True)
class BatchState:
    """The state of the B sequences of one generation; row b of every tensor belongs to sequence b."""

    request_ids: list[str]
    evidence: npt.NDArray[np.float64]
    """(B, 1 + room, D): sums over the tokens so far of what each adds to the domains' averages, from 0 on."""
    logits: npt.NDArray[np.float64]
    """(B, room, D): the logits after each token."""
    recent: Any
    """(B, window, F), an array or a tensor on the model's device: clipped activations of each sequence's last tokens,
    token n at n modulo the window; zero before the first. They name the features when a rule fires."""
    count: npt.NDArray[np.int64]
    """(B,): response tokens judged so far."""
    runs: npt.NDArray[np.int64]
    """(B, R): consecutive tokens at or above each response rule's threshold."""
    latched: npt.NDArray[np.bool_]
    """(B, R): response rules that have fired and are in force; a rule does not fire again until it is released."""
    prompted: npt.NDArray[np.bool_]
    """(B, R): response rules that are in force since they fired on the prompt."""
    rest: npt.NDArray[np.int64]
    """(B, R): consecutive tokens below the threshold of a rule that is in force."""
    best_prompt: npt.NDArray[np.float64]
    """(B, D): highest agreed logit in the prompt."""
    best_response: npt.NDArray[np.float64]
    """(B, D): highest agreed logit in the response."""
    ended: list[bool]
    """Of each sequence, whether a token has ended it; what follows in its row is padding."""
    released: list[tuple[int, str]] = field(default_factory=list)
    """(row, label) of rules that the last step has released, for the engine to let go of."""
    verdicts: list[list[Verdict]] = field(default_factory=list)
    blocked: list[bool] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    even: bool = True
    """Whether the sequences have always got their tokens together."""
    compiled: object = None
    """What the compiled step keeps of where all this lies."""
    counting: bool = False
    """Whether any of `runs` may be above 0, or a rule in force may be released."""
    failed: list[bool] = field(default_factory=list)
    """Of each sequence, whether the guard itself failed while it ran."""

    @classmethod
    def create(
        cls,
        request_ids: Sequence[str],
        *,
        window: int,
        features: int,
        domains: int,
        rules: int,
        device: torch.device | None = None,
    ) -> BatchState:
        """The state before the first token; one row for each of `request_ids`. Without a device it is all arrays."""
        batch = len(request_ids)
        low = np.full((batch, domains), -np.inf)
        return cls(
            request_ids=list(request_ids),
            evidence=np.zeros((batch, 1 + ROOM, domains)),
            logits=np.zeros((batch, ROOM, domains)),
            recent=_zeros((batch, window, features), device),
            count=np.zeros(batch, dtype=np.int64),
            runs=np.zeros((batch, rules), dtype=np.int64),
            latched=np.zeros((batch, rules), dtype=np.bool_),
            prompted=np.zeros((batch, rules), dtype=np.bool_),
            rest=np.zeros((batch, rules), dtype=np.int64),
            best_prompt=low.copy(),
            best_response=low.copy(),
            ended=[False] * batch,
            verdicts=[[] for _ in range(batch)],
            blocked=[False] * batch,
            generated=[0] * batch,
            failed=[False] * batch,
        )

    @property
    def observed(self) -> list[int]:
        """Response tokens judged so far."""
        found: list[int] = self.count.tolist()
        return found

    def make_room(self) -> None:
        """Double the tokens that the histories have room for."""
        self.evidence = np.concatenate([self.evidence, np.zeros_like(self.logits)], axis=1)
        self.logits = np.concatenate([self.logits, np.zeros_like(self.logits)], axis=1)

    def remember(self, rows: Any, slot: Any, clipped: Any) -> None:
        """Keep clipped activations (n, F) of one token of each of `rows` (slices or arrays, as `slot`)."""
        if not isinstance(slot, int) and not isinstance(self.recent, np.ndarray):
            import torch

            rows, slot = (torch.from_numpy(places).to(self.recent.device) for places in (rows, slot))
        self.recent[rows, slot] = clipped

    def renew(self, row: int, request_id: str) -> None:
        """Give a row whose sequence has ended to a new one: nothing of the old one stays."""
        for array in (self.evidence, self.logits, self.recent, self.count, self.runs, self.rest):
            array[row] = 0
        self.latched[row] = self.prompted[row] = False
        self.best_prompt[row] = self.best_response[row] = -np.inf
        self.request_ids[row] = request_id
        self.ended[row] = self.blocked[row] = self.failed[row] = False
        self.generated[row] = 0
        self.verdicts[row] = []
        self.even = False

    def add_rows(self, more: BatchState) -> None:
        """Take over the rows of another state of the same bank and policy that has seen no token."""
        self.evidence, self.logits = (
            np.concatenate([mine, np.zeros((len(theirs), *mine.shape[1:]))])
            for mine, theirs in ((self.evidence, more.evidence), (self.logits, more.logits))
        )
        self.recent = _joined(self.recent, more.recent)
        for name in ("count", "runs", "latched", "prompted", "rest", "best_prompt", "best_response"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(more, name)]))
        for name in ("request_ids", "ended", "verdicts", "blocked", "generated", "failed"):
            getattr(self, name).extend(getattr(more, name))
        self.even, self.compiled = False, None


def _zeros(shape: tuple[int, ...], device: torch.device | None) -> Any:
    if device is None:
        return np.zeros(shape, dtype=np.float32)
    import torch

    return torch.zeros(shape, device=device)


def _joined(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, np.ndarray):
        return np.concatenate([mine, theirs])
    import torch

    return torch.cat([mine, theirs])

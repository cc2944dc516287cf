"""What every way of generating shares: how a whole prompt is judged, and what follows when the guard itself fails."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from feature_bank.layout import layout, template_segments
from guard.events import Verdict
from guard.hook_points import execution_order
from guard.metrics import Metrics
from guard.monitor import Monitor
from guard.reports import ShownFeatures
from guard.state import BatchState

logger = logging.getLogger(__name__)
# Finite, so that a sampler that masks the end token still has a distribution
_ERRORS = 100  # a server that runs for months keeps the last ones
FORBIDDEN = torch.finfo(torch.float16).min


class Judging:
    """The monitor with what it has to know of a tokenizer, and the internal errors of the generation in work."""

    def __init__(self, monitor: Monitor, tokenizer: Any, metrics: Metrics) -> None:
        self.monitor = monitor
        self.metrics = metrics
        self.errors: deque[str] = deque(maxlen=_ERRORS)
        self.special = frozenset[int](tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._template = template_segments(tokenizer, self.special)
        tables = (*monitor.rules.values(), monitor.streaming_rules)
        self.bound = {bound.rule.label: bound for table in tables for bound in table.rules}
        self._shown = ShownFeatures(metrics, monitor.bank)
        self.hook_names = monitor.encoder.hook_names
        self.last_hook = max(self.hook_names, key=execution_order)

    def judge_prompt(
        self,
        state: BatchState,
        row: int,
        ids: Sequence[int],
        hidden: Mapping[str, Float[Tensor, "n d_in"]],
        where: Int[Tensor, " m"] | None = None,
    ) -> list[Verdict]:
        """Judge the whole prompt of sequence `row`: the m tokens `ids`, whose activations lie in the rows `where` of
        `hidden` (in all of them, if not given).

        Raises GuardError if the activations are not numbers.
        """
        observed, segment = self.place(ids)
        positions = observed.nonzero().flatten()
        at = positions if where is None else where[observed]
        acts = self.monitor.encoder.encode({name: x[at] for name, x in hidden.items()})
        self._shown.observe(acts)
        return self.monitor.observe_prompt(state, row, acts, segment, positions)

    def judge_prompt_acts(
        self, state: BatchState, row: int, ids: Sequence[int], feature_acts: Float[Tensor, "m F"]
    ) -> list[Verdict]:
        """`judge_prompt` for activations that are encoded already, one row for each of the m tokens."""
        observed, segment = self.place(ids)
        acts = feature_acts[observed]
        self._shown.observe(acts)
        return self.monitor.observe_prompt(state, row, acts, segment, observed.nonzero().flatten())

    def place(self, ids: Sequence[int]) -> tuple[Bool[Tensor, " m"], Int[Tensor, " k"]]:
        """Which of the tokens are text to be judged, and the segment that each of these belongs to."""
        placed = layout(ids, self.special, self._template)
        observed = torch.from_numpy(placed.observed).to(self.monitor.device)
        return observed, torch.from_numpy(placed.segment).to(self.monitor.device)[observed]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens as it stands before the model, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def fail(self, error: Exception, states: Iterable[BatchState]) -> None:
        """An internal error while the sequences of `states` ran: counted, logged, and by default all of them stop."""
        on_error = self.monitor.policy.on_error
        self.metrics.count_error(on_error)
        self.errors.append(f"{type(error).__name__}: {error}")
        logger.error("guard failed (%s), on_error=%s", self.errors[-1], on_error, exc_info=error)
        for state in states:
            state.failed = [True] * len(state.failed)
            if on_error == "block":
                state.blocked = [True] * len(state.blocked)

"""Per-sequence memory of the guard. It belongs to the sequences of one batch and is dropped with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from guard.events import Verdict


@dataclass(kw_only=True)
class BatchState:
    """The state of the B sequences of one generation; row b of every tensor belongs to sequence b."""

    request_ids: tuple[str, ...]
    ring: Tensor
    """(B, window, D): what each of the last tokens adds to the domains' averages."""
    feature_ring: Tensor
    """(B, window, F): the clipped activations behind it, kept to name the features when a rule fires."""
    count: Tensor
    """(B,): response tokens judged so far."""
    runs: Tensor
    """(B, R): consecutive tokens at or above each response rule's threshold."""
    latched: Tensor
    """(B, R): response rules that have fired; a rule fires once a sequence."""
    best_prompt: Tensor
    """(B, D): highest agreed logit in the prompt."""
    best_response: Tensor
    """(B, D): highest agreed logit in the response."""
    recent: Tensor
    """(B, evidence_tokens, D): the last logits, for their agreement."""
    index: Tensor
    """(B,): 0..B-1, kept to address rows without building it again."""
    ended: list[bool]
    """Of each sequence, whether a token has ended it; what follows in its row is padding."""
    verdicts: list[list[Verdict]] = field(default_factory=list)
    blocked: list[bool] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)
    steps: int | None = 0
    """What every entry of `count` is, while all rows advance together; None once they do not."""
    failed: bool = False
    """Whether the guard itself failed while these sequences ran."""

    @classmethod
    def create(
        cls,
        request_ids: tuple[str, ...],
        *,
        window: int,
        domains: int,
        features: int,
        rules: int,
        evidence_tokens: int,
        device: torch.device,
    ) -> BatchState:
        """The state before the first token; one row for each of `request_ids`."""
        batch = len(request_ids)
        low = torch.full((batch, domains), -torch.inf, device=device)
        return cls(
            request_ids=request_ids,
            ring=torch.zeros(batch, window, domains, device=device),
            feature_ring=torch.zeros(batch, window, features, device=device),
            count=torch.zeros(batch, dtype=torch.long, device=device),
            runs=torch.zeros(batch, rules, dtype=torch.long, device=device),
            latched=torch.zeros(batch, rules, dtype=torch.bool, device=device),
            best_prompt=low.clone(),
            best_response=low.clone(),
            recent=torch.full((batch, evidence_tokens, domains), -torch.inf, device=device),
            index=torch.arange(batch, device=device),
            ended=[False] * batch,
            verdicts=[[] for _ in range(batch)],
            blocked=[False] * batch,
            generated=[0] * batch,
            observed=[0] * batch,
        )

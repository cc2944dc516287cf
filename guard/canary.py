"""The start-up canary: a short text that must give the activations recorded in the bank."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.bank import Bank
from feature_bank.layout import layout, render
from guard.capture import pad_batch, truncated_forward
from guard.encoder import SelectedEncoder
from guard.errors import CanaryError


def canary_activations(encoder: SelectedEncoder, model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """(F,) mean normalised activation of every banked feature over the observed tokens of a passage."""
    rendered = render(tokenizer, text, "passage", max_tokens=256)
    ids, mask = pad_batch([rendered.ids], 0, next(model.parameters()).device)
    hidden = truncated_forward(model, encoder.hook_names, ids, mask)
    observed = torch.from_numpy(layout(rendered.ids, tokenizer.all_special_ids).observed)
    if set(hidden) != set(encoder.hook_names):
        raise CanaryError(f"hooks did not fire: {sorted(set(encoder.hook_names) - set(hidden))}")
    acts = encoder.encode({name: h[0, observed.to(h.device)] for name, h in hidden.items()})
    return acts.mean(0).cpu()


def check_canary(bank: Bank, encoder: SelectedEncoder, model: Any, tokenizer: Any) -> None:
    """Raise CanaryError if the hooks do not fire or the activations are not the recorded ones."""
    check_acts(bank, canary_activations(encoder, model, tokenizer, bank.manifest.canary.text))


def check_acts(bank: Bank, found: Float[Tensor, " F"]) -> None:
    """Raise CanaryError if the canary's mean activations are not the recorded ones."""
    canary = bank.manifest.canary
    position = {feature.id: i for i, feature in enumerate(bank.features)}
    recorded = torch.tensor(list(canary.activations.values()))
    measured = found[[position[feature] for feature in canary.activations]]
    error = float((measured - recorded).norm() / recorded.norm().clamp_min(1e-12))
    if not math.isfinite(error) or error > canary.tolerance:
        raise CanaryError(
            f"the canary text gave activations {error:.1%} off the recorded ones (at most {canary.tolerance:.0%} is "
            "accepted): this is not the model, or not the weights, that the bank was made for"
        )

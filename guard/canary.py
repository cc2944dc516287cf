"""The start-up canary: a short text that must give the activations recorded in the bank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank
from feature_bank.layout import layout, render
from guard.errors import CanaryError
from guard.judge import OnDevice, on_host

if TYPE_CHECKING:
    import torch

    from guard.encoder import SelectedEncoder

CANARY_TOKENS = 256


def canary_activations(encoder: SelectedEncoder, model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """(F,) mean normalised activation of every banked feature over the observed tokens of a passage."""
    import torch  # here, so that the canary can be checked where there is none

    from guard.capture import pad_batch, truncated_forward

    rendered = render(tokenizer, text, "passage", max_tokens=CANARY_TOKENS)
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


def check_acts(bank: Bank, found: npt.NDArray[Any] | OnDevice) -> None:
    """Raise CanaryError if the canary's mean activations (F,) are not the recorded ones."""
    canary = bank.manifest.canary
    error = canary_error(bank, found)
    if not math.isfinite(error) or error > canary.tolerance:
        raise CanaryError(
            f"the canary text gave activations {error:.1%} off the recorded ones (at most {canary.tolerance:.0%} is "
            "accepted): this is not the model, or not the weights, that the bank was made for"
        )


def canary_error(bank: Bank, found: npt.NDArray[Any] | OnDevice) -> float:
    """How far the canary's mean activations (F,) are off the recorded ones, relative to these."""
    activations = bank.manifest.canary.activations
    position = {feature.id: i for i, feature in enumerate(bank.features)}
    recorded = np.array(list(activations.values()))
    measured = on_host(found)[[position[feature] for feature in activations]].astype(np.float64)
    return float(np.linalg.norm(measured - recorded) / max(float(np.linalg.norm(recorded)), 1e-12))

"""Changing the residual stream of chosen sequences through the bank's decoder rows."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from feature_bank.bank import Bank
from guard.encoder import SelectedEncoder
from guard.heads import BoundRule
from guard.policy import Steer


class Steering:
    """The interventions in force on a batch of B sequences. Rows without one are never written to."""

    def __init__(self, bank: Bank, encoder: SelectedEncoder, batch: int) -> None:
        self._bank = bank
        self._encoder = encoder
        self._batch = batch
        self._add: dict[str, Float[Tensor, "B d_in"]] = {}
        self._clamped: dict[str, Bool[Tensor, "B n_selected"]] = {}
        self._target: dict[str, Float[Tensor, "B n_selected"]] = {}
        self._in_force: set[tuple[int, str, Steer]] = set()

    @property
    def active(self) -> bool:
        """Whether any sequence is steered."""
        return bool(self._add) or bool(self._clamped)

    def steer(self, row: int, bound: BoundRule) -> None:
        """Put a rule's steering into force on one sequence, at every hook point.

        Doing so again (the rule fired on the prompt and on the response) changes nothing.
        """
        steer = bound.rule.steer
        if (row, bound.rule.target, steer) in self._in_force:
            return
        self._in_force.add((row, bound.rule.target, steer))
        gains = torch.zeros(self._encoder.n_features)
        chosen = torch.zeros(self._encoder.n_features, dtype=torch.bool)
        if bound.head is None:
            gains[bound.columns] = steer.strength * self._encoder.scale.cpu()[bound.columns]
            chosen[bound.columns] = True
        else:
            head = self._bank.heads[bound.domain]
            position = {feature.id: i for i, feature in enumerate(self._bank.features)}
            for feature, weight, delta in zip(head.features, head.weights, head.steering, strict=True):
                gains[position[feature]] = steer.strength * delta
                chosen[position[feature]] = weight > 0
        if steer.op == "add":
            self.add(row, gains)
        else:
            self.clamp(row, chosen, steer.value if steer.op == "clamp" else 0.0)

    def add(self, row: int, gains: Float[Tensor, " F"]) -> None:
        """x += sum_f gains_f * W_dec[f] on one sequence; gains in units of the activation. Zeros change nothing."""
        for name, columns in self._encoder.columns.items():
            decoder = self._encoder.decoder[name]
            part = gains[columns].to(decoder.device)
            if not bool(part.any()):
                continue
            if name not in self._add:
                self._add[name] = torch.zeros(self._batch, decoder.shape[1], device=decoder.device)
            self._add[name][row] += part @ decoder

    def clamp(self, row: int, chosen: Bool[Tensor, " F"], value: float) -> None:
        """Hold the chosen features of one sequence at `value` times their scale, keeping the SAE's error term."""
        for name, columns in self._encoder.columns.items():
            part = chosen[columns]
            if not bool(part.any()):
                continue
            if name not in self._clamped:
                shape = (self._batch, part.shape[0])
                device = self._encoder.decoder[name].device
                self._clamped[name] = torch.zeros(shape, dtype=torch.bool, device=device)
                self._target[name] = torch.zeros(shape, device=device)
            self._clamped[name][row] |= part.to(self._clamped[name].device)
            self._target[name][row] = torch.where(part.to(self._target[name].device), value, self._target[name][row])

    def apply(
        self,
        name: str,
        hidden: Float[Tensor, "B seq d_in"],
        positions: Bool[Tensor, "B seq"] | None = None,
    ) -> Float[Tensor, "B seq d_in"] | None:
        """The steered activation of one hook point, or None if nothing there is steered.

        positions: where to steer; None for everywhere. All other positions and sequences keep their bits.
        """
        if name not in self._add and name not in self._clamped:
            return None
        rows = torch.zeros(self._batch, dtype=torch.bool, device=hidden.device)
        if name in self._add:
            rows |= self._add[name].any(1)
        if name in self._clamped:
            rows |= self._clamped[name].any(1)
        where = rows[:, None].expand(hidden.shape[:2])
        if positions is not None:
            where = where & positions
        if not bool(where.any()):
            return None
        sequence = where.nonzero()[:, 0]
        chosen = hidden[where]
        delta = torch.zeros_like(chosen, dtype=torch.float32)
        if name in self._add:
            delta += self._add[name][sequence]
        if name in self._clamped:
            scale = self._encoder.scale[self._encoder.columns[name]]
            acts = self._encoder.encode_hook(name, chosen)
            change = (self._target[name][sequence] - acts) * scale * self._clamped[name][sequence]
            delta += change @ self._encoder.decoder[name]
        steered = hidden.clone()
        steered[where] = (chosen.float() + delta).to(hidden.dtype)
        return steered

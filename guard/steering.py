"""Changing the residual stream of chosen sequences through the bank's rows.

An SAE's features add up to the activation, so that each is changed through its own decoder row, the SAE's error term
kept. Directions are readings x @ w + b that overlap: taking one out moves the others. They are clamped together, by
the smallest change of the activation that brings all their readings where they belong (least squares, damped).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from feature_bank.bank import Bank
from guard.encoder import SelectedEncoder
from guard.policy import Steer
from guard.rules import BoundRule

DAMPING = 0.1
"""Of the least squares over directions of unit length: readings that nearly coincide are not torn apart."""


class Steering:
    """The interventions in force on a batch of B sequences. Rows without one are never written to.

    fixed: all tables lie in one place from the beginning, so that `change` reads them without asking which rows are
    in use: what a captured graph replays has to.
    """

    def __init__(self, bank: Bank, encoder: SelectedEncoder, batch: int, *, fixed: bool = False) -> None:
        self._bank = bank
        self._encoder = encoder
        self._batch = batch
        self._add: dict[str, Float[Tensor, "B d_in"]] = {}
        device = encoder.scale.device
        self._directions = {
            name: torch.tensor([bool(f.direction) for f in bank.features[part]], dtype=torch.bool, device=device)
            for name, part in encoder.columns.items()
        }
        self._clamped: dict[str, Bool[Tensor, "B n_selected"]] = {}
        self._target: dict[str, Float[Tensor, "B n_selected"]] = {}
        self._joint: dict[str, dict[int, Float[Tensor, "n_selected d_in"]]] = {}
        self._limit: Float[Tensor, " B"] = torch.full((batch,), torch.inf, device=device)
        self._in_force: dict[tuple[int, str, Steer], set[str]] = {}  # the rules that ask for it
        self._bound: dict[str, BoundRule] = {}
        self.on_prompt: set[int] = set()
        """Sequences of which a rule asks to steer the prompt as well."""
        if fixed:
            for name, decoder in encoder.decoder.items():
                self._add[name] = torch.zeros(batch, decoder.shape[1], device=device)
                self._hold(name)
                self._joint[name] = {row: torch.zeros_like(decoder) for row in range(batch)}

    @property
    def active(self) -> bool:
        """Whether any sequence is steered."""
        return bool(self._add) or bool(self._clamped)

    def steer(self, row: int, bound: BoundRule) -> None:
        """Put a rule's steering into force on one sequence, at every hook point.

        Doing so again (the rule fired on the prompt and on the response) changes nothing.
        """
        key = (row, bound.rule.target, bound.rule.steer)
        self._bound[bound.rule.label] = bound
        if bound.rule.steer.prompt:
            self.on_prompt.add(row)
        if key not in self._in_force:
            self._apply_rule(row, bound)
        self._in_force.setdefault(key, set()).add(bound.rule.label)

    def release(self, row: int, bound: BoundRule) -> None:
        """Let go of a rule's steering of one sequence; what other rules do to it stays."""
        key = (row, bound.rule.target, bound.rule.steer)
        asking = self._in_force.get(key, set())
        asking.discard(bound.rule.label)
        if asking or self._in_force.pop(key, None) is None:
            return
        self._clear(row)
        for (other, _, _), labels in self._in_force.items():
            if other == row:
                self._apply_rule(row, self._bound[next(iter(labels))])

    def clear(self, row: int) -> None:
        """Let go of everything that is in force on one sequence."""
        self._clear(row)
        self._in_force = {key: labels for key, labels in self._in_force.items() if key[0] != row}
        self.on_prompt.discard(row)

    def _clear(self, row: int) -> None:
        for tensors in (self._add, self._clamped, self._target):
            for tensor in tensors.values():
                tensor[row] = 0
        for joint in self._joint.values():
            if row in joint:
                joint[row].zero_()
        self._limit[row] = torch.inf

    def _apply_rule(self, row: int, bound: BoundRule) -> None:
        steer = bound.rule.steer
        self._limit[row] = self._limit[row].clamp_max(steer.limit)
        gains = torch.zeros(self._encoder.n_features)
        chosen = torch.zeros(self._encoder.n_features, dtype=torch.bool)
        for signal in bound.signals:
            if signal.head is None:
                gains[signal.columns] = steer.strength * self._encoder.scale.cpu()[signal.columns]
                chosen[signal.columns] = True
                continue
            head = self._bank.heads[signal.domain]
            position = {feature.id: i for i, feature in enumerate(self._bank.features)}
            for feature, delta in zip(head.features, head.steering, strict=True):
                gains[position[feature]] = steer.strength * delta
                chosen[position[feature]] |= delta > 0
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
        """Hold the chosen features of one sequence at `value` times their scale, keeping the SAE's error term.

        A direction that is held at 0 or below is only ever lowered: where it reads less, it is left.
        """
        for name, columns in self._encoder.columns.items():
            part = chosen[columns]
            if not bool(part.any()):
                continue
            if name not in self._clamped:
                self._hold(name)
            self._clamped[name][row] |= part.to(self._clamped[name].device)
            self._target[name][row] = torch.where(part.to(self._target[name].device), value, self._target[name][row])
            self._join(name, row)

    def _hold(self, name: str) -> None:
        decoder = self._encoder.decoder[name]
        shape = (self._batch, decoder.shape[0])
        self._clamped[name] = torch.zeros(shape, dtype=torch.bool, device=decoder.device)
        self._target[name] = torch.zeros(shape, device=decoder.device)
        self._joint[name] = {}

    def _join(self, name: str, row: int) -> None:
        """Solve for what moves the readings of a sequence's clamped directions: (n_selected, d_in), one row for a
        reading moved by 1."""
        columns = (self._clamped[name][row] & self._directions[name]).nonzero()[:, 0]
        if not len(columns):
            return
        weight = self._encoder.stored(name, columns)
        gram = weight.T @ weight + DAMPING * torch.eye(len(columns), device=weight.device)
        solved = torch.linalg.solve(gram, weight.T)
        joint = self._joint[name].setdefault(row, torch.zeros_like(self._encoder.decoder[name]))
        joint[columns] = solved

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
        steered = hidden.clone()
        steered[where] = (chosen.float() + self.change(name, chosen, sequence)).to(hidden.dtype)
        return steered

    def change(
        self, name: str, hidden: Float[Tensor, "n d_in"], sequence: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_in"]:
        """What is added to n activations of one hook point, each of the given sequence."""
        delta = torch.zeros_like(hidden, dtype=torch.float32)
        if name in self._add:
            delta += self._add[name][sequence]
        if name in self._clamped:
            delta += self._clamping(name, hidden, sequence)
        return delta * self._within(delta, hidden, self._limit[sequence])

    def _clamping(self, name: str, hidden: Float[Tensor, "n d_in"], sequence: Int[Tensor, " n"]) -> Tensor:
        """(n, d_in) what clamping adds to the activations of the given sequences."""
        held, target = self._clamped[name][sequence], self._target[name][sequence]
        directions = self._directions[name]
        scale = self._encoder.scale[self._encoder.columns[name]]
        readings, acts = self._encoder.read(name, hidden)
        delta = ((target - acts) * scale * (held & ~directions)) @ self._encoder.decoder[name]
        if self._joint[name]:
            below = torch.where(target > 0, target - readings, (target - readings).clamp_max(0.0))
            move = below * scale * (held & directions)
            for row, joint in self._joint[name].items():
                delta += (move * (sequence == row)[:, None]) @ joint
        return delta

    @staticmethod
    def _within(
        delta: Float[Tensor, "n d_in"], hidden: Float[Tensor, "n d_in"], limit: Float[Tensor, " n"]
    ) -> Float[Tensor, "n 1"]:
        """What a change is multiplied by to be no longer than `limit` times the activation it changes."""
        allowed = limit * hidden.float().norm(dim=1)
        share: Tensor = allowed / delta.norm(dim=1).clamp_min(1e-12)
        return share.clamp_max(1.0)[:, None]

"""Conditions and interventions in code: `guard.when(feature("L14/2031") > 0.5).clamp(0)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from guard.events import Phase
from guard.policy import Condition, Rule, Steer

G = TypeVar("G")


@dataclass(frozen=True, slots=True)
class Target:
    """A domain, concept or feature that is not compared yet: `>` or `>=` makes it a condition (both: at least).

    A domain is compared by its calibrated probability, the others by their activation, as a multiple of a feature's
    99.9th percentile.
    """

    kind: Literal["domain", "concept", "feature"]
    name: str

    def __gt__(self, value: float) -> Condition:
        unit = "probability" if self.kind == "domain" else "activation"
        return Condition.model_validate({self.kind: self.name, "threshold": {unit: value}})

    __ge__ = __gt__


def feature(feature_id: str) -> Target:
    """A feature by its id, such as `L14/2031`."""
    return Target("feature", feature_id)


def concept(name: str) -> Target:
    """The bank's features that are tagged with `DOMAIN/CONCEPT`; the strongest counts."""
    return Target("concept", name)


def domain(name: str) -> Target:
    """A domain by its head."""
    return Target("domain", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class When(Generic[G]):
    """A condition that waits for what is to be done; each method gives what holds it with one rule more."""

    condition: Condition
    add_rule: Callable[[Rule], G]
    scope: tuple[Phase, ...]
    evidence_tokens: int | None
    name: str

    def flag(self) -> G:
        """Report it."""
        return self._rule("flag")

    def block(self) -> G:
        """Stop the sequence."""
        return self._rule("block")

    def clamp(self, value: float) -> G:
        """Hold every feature that the condition names (of a domain: those that speak for it) at `value` times its
        scale, from the next generated token on: 0 takes it out, more than 1 turns it up."""
        return self._rule("steer", Steer(op="clamp", value=value))

    def add(self, strength: float) -> G:
        """Add `strength` times their direction; see `Steer`."""
        return self._rule("steer", Steer(op="add", strength=strength))

    def ablate(self) -> G:
        """Take them out."""
        return self._rule("steer", Steer(op="ablate"))

    def _rule(self, action: Literal["flag", "steer", "block"], steer: Steer | None = None) -> G:
        single = not self.condition.parts
        about = self.condition.model_dump(exclude_none=True) if single else {"when": self.condition}
        return self.add_rule(
            Rule.model_validate(
                {
                    **about,
                    "scope": self.scope,
                    "evidence_tokens": self.evidence_tokens,
                    "action": action,
                    "steer": steer or Steer(),
                    "name": self.name,
                }
            )
        )

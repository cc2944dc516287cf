"""Conditions and interventions in code: `guard.when(feature("L14/2031") > 0.5).clamp(0)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from guard.errors import PolicyError
from guard.events import Phase
from guard.policy import Condition, Rule, Steer, reason

G = TypeVar("G")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Target:
    """A domain, concept or feature that is not compared yet: `>` or `>=` makes it a condition (both: at least).

    A domain is compared by its calibrated probability, the others by their activation, as a multiple of a feature's
    99.9th percentile. Raises PolicyError for a name or a value that cannot be.
    """

    kind: Literal["domain", "concept", "feature"]
    name: str

    def __gt__(self, value: float) -> Condition:
        unit = "probability" if self.kind == "domain" else "activation"
        about = {self.kind: self.name, "threshold": {unit: value}}
        return _checked(Condition, about, f"{self.kind}({self.name!r}) > {value!r}")

    __ge__ = __gt__


def _checked(kind: type[M], data: dict[str, Any], what: str) -> M:
    """The record, or PolicyError that says what was written and what is wrong with it."""
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        raise PolicyError(f"{what}: {reason(e)}") from None


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
    """A condition that waits for what is to be done; each method gives what holds it with one rule more.

    Raises PolicyError for what is no condition, and for a number that is out of its range.
    """

    condition: Condition
    add_rule: Callable[[Rule], G]
    scope: tuple[Phase, ...]
    evidence_tokens: int | None
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.condition, Condition):
            raise PolicyError(f"{self.condition!r} is no condition; compare it, such as feature('L14/2031') > 0.5")

    def flag(self) -> G:
        """Report it."""
        return self._rule("flag")

    def block(self) -> G:
        """Stop the sequence."""
        return self._rule("block")

    def clamp(self, value: float) -> G:
        """Hold every feature that the condition names (of a domain: those that speak for it) at `value` times its
        scale, from the next generated token on: 0 takes it out, more than 1 turns it up."""
        return self._rule("steer", op="clamp", value=value)

    def add(self, strength: float) -> G:
        """Add `strength` times their direction; see `Steer`."""
        return self._rule("steer", op="add", strength=strength)

    def ablate(self) -> G:
        """Take them out."""
        return self._rule("steer", op="ablate")

    def _rule(self, action: Literal["flag", "steer", "block"], **steer: Any) -> G:
        single = not self.condition.parts
        about = self.condition.model_dump(exclude_none=True) if single else {"when": self.condition}
        rule = {
            **about,
            "scope": self.scope,
            "evidence_tokens": self.evidence_tokens,
            "action": action,
            "steer": _checked(Steer, steer, steer.get("op", action)),
            "name": self.name,
        }
        return self.add_rule(_checked(Rule, rule, f"the rule on {self.condition}"))

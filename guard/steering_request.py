"""Steering that one request brings with it, as it is written: `TARGET=STRENGTH`, `TARGET=clamp:VALUE`, `TARGET=ablate`.

A target is a domain, a concept (`DOMAIN/CONCEPT`) or a feature's id. It becomes a rule like those of a policy, but one
that waits for nothing: whoever asks for it has it in force at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from feature_bank.bank import Bank
from guard.errors import PolicyError
from guard.heads import DomainHeads
from guard.policy import Policy, Rule, Steer, Threshold, reason
from guard.rules import BoundRule, bind_rules

__all__ = ["PREFIX", "steering_rule", "steering_rules"]

PREFIX = "request:"
"""How the labels of such rules begin."""


def steering_rules(bank: Bank, items: Iterable[object]) -> tuple[BoundRule, ...]:
    """What each of `items` asks for. Raises PolicyError, as `steering_rule` does."""
    return tuple(steering_rule(bank, item) for item in items)


def steering_rule(bank: Bank, item: object) -> BoundRule:
    """What `item` asks for, resolved against the bank.

    Raises PolicyError if it is no steering, or if the bank does not hold what it names or cannot steer it.
    """
    policy = Policy(name="request", rules=(_parse(item, bank.pooling.ceiling),))
    heads = DomainHeads(bank, streaming=True)
    (bound,) = bind_rules(policy, bank, heads, "response", streaming=True).rules
    return bound


def _parse(item: object, ceiling: float) -> Rule:
    target, _, what = str(item).partition("=")
    try:
        op, _, value = what.partition(":")
        if op == "clamp":
            steer = Steer(op="clamp", value=float(value))
        elif op == "ablate" and not value:
            steer = Steer(op="ablate")
        else:
            steer = Steer(op="add", strength=float(what))
        kind = "feature" if target.startswith("L") else "concept" if "/" in target else "domain"
        # A rule has a threshold, though nothing is compared with this one: any that the bank takes will do.
        threshold = Threshold(probability=0.5) if kind == "domain" else Threshold(activation=min(1.0, ceiling))
        return Rule.model_validate(
            {kind: target, "threshold": threshold, "action": "steer", "steer": steer, "name": f"{PREFIX}{item}"}
        )
    except ValidationError as e:
        raise PolicyError(f"{str(item)!r}: {reason(e)}") from None
    except ValueError:
        raise PolicyError(
            f"{str(item)!r}: expected TARGET=STRENGTH, TARGET=clamp:VALUE or TARGET=ablate, "
            "with a domain, a concept or a feature's id as TARGET"
        ) from None

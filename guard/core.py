"""The entry point: a bank and a policy, ready to be attached to a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.bank import Bank, shipped_bank_path
from guard.conditions import When
from guard.policy import Condition, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guard.events import Phase
    from guard.metrics import Metrics
    from guard.session import AttachedGuard


class Guard:
    """A feature bank under a policy. One guard can be attached to several models; no sequence's state lives here."""

    def __init__(self, bank: Bank, policy: Policy, metrics: Metrics | None = None) -> None:
        from guard.metrics import Metrics

        self.bank = bank
        self.policy = policy
        self.metrics = metrics or Metrics()

    @classmethod
    def from_bank(
        cls,
        path: str | Path | None = None,
        *,
        policy: Policy | str | Path | None = None,
        metrics: Metrics | None = None,
    ) -> Guard:
        """Load and verify a bank (the shipped one by default) and a policy (a file, or the default one).

        Raises BankError or PolicyError naming the file and field that is wrong.
        """
        bank = Bank.load(path if path is not None else shipped_bank_path())
        if policy is None:
            policy = Policy.default()
        elif not isinstance(policy, Policy):
            policy = Policy.load(policy)
        return cls(bank, policy, metrics)

    def when(
        self,
        condition: Condition,
        *,
        scope: Sequence[Phase] = ("prompt", "response"),
        evidence_tokens: int | None = None,
        name: str = "",
    ) -> When[Guard]:
        """A guard with one rule more: `guard.when(feature("L14/2031") > 0.5).clamp(0)`.

        This guard stays as it is. The rules are in its policy, which `Policy.to_yaml` writes; whether the bank holds
        what they name is seen when it is attached.
        """
        return When(
            condition=condition,
            add_rule=lambda rule: Guard(self.bank, self.policy.with_rule(rule), self.metrics),
            scope=tuple(scope),
            evidence_tokens=evidence_tokens,
            name=name,
        )

    def attach(self, model: Any, tokenizer: Any) -> AttachedGuard:
        """Hook the guard into a model; use the result as a context manager, or call its `close()`.

        Raises BankError if the bank was made for another model, CanaryError if the model does not reproduce
        the bank's recorded activations, PolicyError if the policy asks for what the bank does not hold.
        """
        from guard.session import AttachedGuard

        attached = AttachedGuard(self, model, tokenizer)
        self.publish()
        return attached

    def publish(self) -> None:
        """Say in the metrics which bank and policy are in use."""
        from guard.reports import publish

        publish(self.metrics, self.bank, self.policy)

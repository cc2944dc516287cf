"""A guarded model for the length of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service.commands.terminal import error_console

if TYPE_CHECKING:
    from guard.core import Guard
    from guard.models import LoadedModel
    from guard.policy import Policy
    from guard.session import AttachedGuard

__all__ = ["load", "opened"]


def load(model: str | None, bank: Path | None, policy: Path | Policy | None) -> tuple[Guard, LoadedModel]:
    """The guard and the model. The bank and the policy are read first: a mistake there shows at once."""
    with error_console().status("loading the bank and the model"):
        from guard.core import Guard

        guard = Guard.from_bank(bank, policy=policy)
        from guard.models import load_model

        return guard, load_model(model)


@contextmanager
def opened(model: str | None, bank: Path | None, policy: Path | None) -> Iterator[AttachedGuard]:
    """Load the model and attach the guard; both go when the context ends.

    Raises ModelError, BankError, PolicyError or CanaryError.
    """
    guard, loaded = load(model, bank, policy)
    with guard.attach(loaded.model, loaded.tokenizer) as attached:
        yield attached

"""Errors of the online side, in the project's one exception tree."""

from __future__ import annotations

from feature_bank.errors import SailguardError


class PolicyError(SailguardError):
    """A policy file is unreadable or names a field, domain or value that does not exist."""


class GuardError(SailguardError):
    """The guard cannot do its work: wrong model for the bank, hooks that do not fire, tokens not observed."""


class CanaryError(GuardError):
    """The start-up canary did not reproduce the bank's recorded activations."""


class UnsupportedGenerationError(GuardError):
    """A way of generating in which the guard could not map every row to its sequence."""

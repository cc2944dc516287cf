"""The one exception tree of the project: whatever a user can cause derives from `SailguardError`."""

from __future__ import annotations


class SailguardError(Exception):
    """Base of every error that a user can cause. The message names what is wrong and what to do."""


class BankError(SailguardError):
    """A bank or SAE folder is unreadable, altered, incomplete or of an unknown schema.

    `file` and `field` name the place; both stand in the message too.
    """

    def __init__(self, message: str, *, file: str | None = None, field: str | None = None) -> None:
        place = " ".join(
            part for part in (f"file {file!r}" if file else "", f"field {field!r}" if field else "") if part
        )
        super().__init__(f"{place}: {message}" if place else message)
        self.message = message
        self.file = file
        self.field = field


class DataError(SailguardError):
    """A file of text rows is missing, malformed or lacks what the task needs."""


class ModelError(SailguardError):
    """A model or tokenizer is missing, half-written or altered."""


class MissingExtraError(SailguardError):
    """An optional package is needed; the message names the extra to install."""

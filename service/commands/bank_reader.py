"""A bank and what has been said of it, as the commands that look into one read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from service.commands.terminal import error_console, plain

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from feature_bank.review import EffectiveLabel, ReviewLog

__all__ = ["read_bank", "read_labelled", "warn_of_torn_lines"]


def read_bank(path: Path | None) -> Bank:
    """The bank at `path`, verified; the shipped one if no path is given."""
    from feature_bank.bank import Bank

    return Bank.load(place_of(path))


def read_labelled(path: Path | None) -> tuple[Bank, ReviewLog, dict[str, EffectiveLabel]]:
    """The bank, its reviews, and the labels that follow from them. Lines that a crash tore are reported."""
    from feature_bank.review import load_labels

    bank = read_bank(path)
    log, labels = load_labels(place_of(path), bank)
    warn_of_torn_lines(place_of(path), log)
    return bank, log, labels


def place_of(path: Path | None) -> Path:
    """The folder that an argument means."""
    from feature_bank.bank import shipped_bank_path

    return path if path is not None else shipped_bank_path()


def warn_of_torn_lines(path: Path, log: ReviewLog) -> None:
    """Say on standard error which lines of a log were not written to their end."""
    from feature_bank.review import review_file

    if log.torn:
        lines = ", ".join(map(str, log.torn))
        message = f"{review_file(path)}: line {lines} was not written to its end; it is kept, but does not count"
        error_console().print(plain(message), markup=False, soft_wrap=True, style="yellow")

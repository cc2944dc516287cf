"""What the `train` commands share: which files they read, and where they may write."""

from __future__ import annotations

import os
from pathlib import Path

from feature_bank.errors import DataError, SailguardError

__all__ = ["DATA_FILES", "DATA_FOLDER", "check_target", "data_files", "existing"]

DATA_FOLDER = "SAILGUARD_DATA"
DATA_FILES = ("fit.jsonl.gz", "general.jsonl.gz")


def data_files(given: list[Path]) -> list[Path]:
    """The files that were named, or those of the folder that the environment names. Raises DataError for none."""
    return existing(given or _default_data())


def _default_data() -> list[Path]:
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        raise DataError(f"there is nothing to train on: name files with --data, or set {DATA_FOLDER} to their folder")
    return [Path(folder) / name for name in DATA_FILES]


def existing(paths: list[Path]) -> list[Path]:
    """The same paths. Raises DataError for one that is no file."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --data")
    return paths


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse, before hours of work, to replace what is no bank, or a bank without leave."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "bank.json").is_file():
        raise SailguardError(f"{out}: --out exists and is no bank; name a new folder")
    if not overwrite:
        raise SailguardError(f"{out}: --out holds a bank already; add --overwrite to replace it, or name a new folder")

"""What the `train` commands share: which files they read, where they may write, and how they tell their progress."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self

from feature_bank.errors import DataError, SailguardError
from service.commands.terminal import error_console, plain

__all__ = ["DATA_FILES", "DATA_FOLDER", "StageReport", "check_target", "data_files", "existing"]

DATA_FOLDER = "SAILGUARD_DATA"
DATA_FILES = ("fit.jsonl.gz", "general.jsonl.gz")
LINE_SECONDS = 30.0


class StageReport:
    """Progress of the stages on standard error: bars on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
        )
        self._console = error_console()
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        self._started = time.monotonic()
        self._last = self._started

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, detail: str) -> None:
        """A stage has done so much of its total; `detail` says what in words."""
        detail = plain(detail)
        if self._console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total, detail=detail)
            self._progress.update(self._tasks[stage], completed=done, total=total, detail=detail)
            return
        now = time.monotonic()
        ended = done >= total
        if self._said.get(stage) == detail or (not ended and now - self._last < LINE_SECONDS):
            return
        self._said[stage], self._last = detail, now
        share = "" if ended else f" {done}/{total}"
        self._console.print(f"{now - self._started:7.0f} s  {stage}{share}: {detail}", markup=False, soft_wrap=True)


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

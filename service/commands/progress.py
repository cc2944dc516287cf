"""Progress of work that takes minutes, on standard error."""

from __future__ import annotations

import time
from typing import Self

from service.commands.terminal import error_console, plain

__all__ = ["StageReport"]

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
        """Say how far a stage is: a bar on a terminal, else a line if the detail is new and the last one is old."""
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

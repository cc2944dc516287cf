"""`train`: a feature bank of one's own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Self

import typer

from feature_bank.errors import DataError, SailguardError
from service.commands.options import ModelOption
from service.commands.terminal import error_console, output_console, plain

__all__ = ["train"]

DATA_FOLDER = "SAILGUARD_DATA"
DATA_FILES = ("fit.jsonl.gz", "general.jsonl.gz")
LINE_SECONDS = 30.0


def train(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The bank to write.")],
    preset: Annotated[str, typer.Option("--preset", help="Named settings, or a preset file.")] = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines, gzipped or not; several times for several files. "
            f"Default: {' and '.join(DATA_FILES)} in the folder that {DATA_FOLDER} names.",
        ),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="More files, as if each followed --data.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="FOLDER",
            help="Intermediate results, from which a second run resumes. Default: OUT.work",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bank that OUT holds.")] = False,
    model: ModelOption = None,
) -> None:
    """Train SAEs on a model's activations and distil them into a feature bank."""
    _check_target(out, overwrite)
    paths = [*(data or []), *(more or [])] or _default_data()
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --data")

    from feature_bank.identity import identify
    from guard.models import load_model
    from training.pipeline import load_preset, train_bank

    settings = load_preset(preset)
    loaded = load_model(model)
    with _StageReport() as report:
        bank = train_bank(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            identity=identify(loaded.model, loaded.tokenizer, loaded.model_id),
            preset=settings,
            data=paths,
            out=out,
            work=work or out.with_name(f"{out.name}.work"),
            report=report,
        )
    output_console().print(f"{bank.version}: {len(bank.features)} features in {out}", markup=False, soft_wrap=True)


class _StageReport:
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


def _default_data() -> list[Path]:
    folder = os.environ.get(DATA_FOLDER)
    if not folder:
        raise DataError(f"there is nothing to train on: name files with --data, or set {DATA_FOLDER} to their folder")
    return [Path(folder) / name for name in DATA_FILES]


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse, before hours of work, to replace what is no bank, or a bank without leave."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "bank.json").is_file():
        raise SailguardError(f"{out}: --out exists and is no bank; name a new folder")
    if not overwrite:
        raise SailguardError(f"{out}: --out holds a bank already; add --overwrite to replace it, or name a new folder")

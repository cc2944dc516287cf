"""`score`: every row of a file judged, one JSON line a row."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple

import typer

from feature_bank.errors import DataError
from service.commands.options import BankOption, ModelOption, PolicyOption
from service.commands.session import opened
from service.commands.terminal import error_console

if TYPE_CHECKING:
    from feature_bank.layout import Role
    from guard.events import TextScore
    from guard.session import AttachedGuard

__all__ = ["score", "score_texts"]

BATCH_ROWS = 64


class _Row(NamedTuple):
    id: str
    text: str
    role: Role


def score(
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="JSON lines, gzipped or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON lines to write; gzipped if it ends in .gz.")],
    model: ModelOption = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
) -> None:
    """Score every row of a file: one JSON line each, with id, scores by domain and the policy's action.

    A row needs `text`; `id` and `role` (prompt, response or passage, the default) are optional. The output
    appears whole when all rows are done.
    """
    if out.is_dir():
        raise DataError(f"{out}: --out is a folder; name a file")
    if out.exists() and data.exists() and out.samefile(data):
        raise DataError(f"{out}: --out names the file that --data reads; name another one")
    total = sum(1 for _ in _rows(data))  # a malformed row shows before any work is done
    with opened(model, bank, policy) as attached, _atomic_lines(out) as file:
        rows = _rows(data)
        ids = []

        def texts() -> Iterator[tuple[str, Role]]:
            for row in rows:
                ids.append(row.id)
                yield row.text, row.role

        for number, result in enumerate(score_texts(attached, texts(), total)):
            line = {
                "id": ids[number],
                "scores": dict(result.scores),
                "action": result.action,
                "tokens": result.tokens,
                "truncated": result.truncated,
            }
            file.write(json.dumps(line) + "\n")
    error_console().print(f"{total} rows scored: {out}", markup=False, soft_wrap=True)


def score_texts(attached: AttachedGuard, texts: Iterator[tuple[str, Role]], total: int) -> Iterator[TextScore]:
    """The scores of (text, role) pairs, in order, some at a time, with a progress bar on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console()) as progress:
        task = progress.add_task("scoring", total=total)
        while batch := list(islice(texts, BATCH_ROWS)):
            yield from attached.score([text for text, _ in batch], [role for _, role in batch])
            progress.advance(task, len(batch))


def _rows(path: Path) -> Iterator[_Row]:
    from feature_bank.layout import ROLES, clean
    from training.corpus import read_rows

    for number, row in read_rows(path):
        text = clean(row["text"])
        role = row.get("role") or "passage"
        if role not in ROLES:
            raise DataError(f"{path}, line {number}, field 'role': {role!r} is not one of {', '.join(ROLES)}")
        row_id = str(row.get("id") or hashlib.sha256(text.encode()).hexdigest()[:16])
        yield _Row(row_id, text, role)


@contextmanager
def _atomic_lines(out: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `out` when it is whole, and leaves no trace otherwise."""
    from feature_bank.atomic import atomic_file

    with atomic_file(out) as tmp:
        if out.suffix == ".gz":
            with (
                tmp.open("wb") as raw,
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
                io.TextIOWrapper(packed, encoding="ascii") as file,
            ):
                yield file
        else:
            with tmp.open("w", encoding="ascii") as file:
                yield file

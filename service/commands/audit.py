"""The group `audit`: what the server's audit holds, taken out of its file or removed from it."""

from __future__ import annotations

import contextlib
import math
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from service.audit_store import Selection

__all__ = ["build_app"]

_DAY = 86400.0


class AuditedAction(StrEnum):
    """The actions that the audit holds."""

    FLAG = "flag"
    STEER = "steer"
    BLOCK = "block"


FileOption = Annotated[
    Path, typer.Option("--file", metavar="FILE", envvar="SAILGUARD_AUDIT", help="The file of the setting `audit`.")
]


def build_app() -> typer.Typer:
    """The group `audit`."""
    app = typer.Typer(help="Read the server's audit, and remove its old entries.", no_args_is_help=True)
    app.command()(export)
    app.command()(stats)
    app.command()(prune)
    return app


def export(
    file: FileOption,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only entries from then on: 2026-03-01 or 2026-03-01T12:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only entries before then.")] = None,
    action: Annotated[AuditedAction | None, typer.Option(help="Only entries with this action.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only entries about this domain.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write to this file, whole or not at all.")
    ] = None,
) -> None:
    """Write entries as JSON lines, oldest first, while the server goes on. A time without a zone is UTC."""

    from service.audit_store import Selection

    selection = Selection(
        since=_time("--since", since),
        until=_time("--until", until),
        action=None if action is None else action.value,
        domain=domain,
    )
    if out is None:
        for lines in _lines(file, selection):
            typer.echo(lines, nl=False)
        return
    from feature_bank.atomic import atomic_file

    if out.exists() and out.samefile(file):
        raise typer.BadParameter("this is the audit itself", param_hint="--out")
    with atomic_file(out) as tmp:
        tmp.chmod(0o600)  # as private as the file that it comes from
        with tmp.open("w", encoding="ascii") as target:
            for lines in _lines(file, selection):
                target.write(lines)


def stats(file: FileOption, as_json: JsonOption = False) -> None:
    """Count entries by action, domain, rule, and by the versions that gave them."""
    from service.audit_store import statistics

    with _reading(file) as connection:
        found = {**statistics(connection), "bytes": file.stat().st_size}
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    console = output_console()
    console.print(f"entries   {found['entries']} ({found['with_text']} with text), {found['bytes']} bytes")
    if found["entries"]:
        console.print(f"from      {found['first']}\nto        {found['last']}\n")
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("by")
        table.add_column("value", overflow="fold")
        table.add_column("entries", justify="right", no_wrap=True)
        for column, counts in found["by"].items():
            for value, count in counts.items():
                table.add_row(column, plain(value) or "-", str(count))
        console.print(table, markup=False)


def prune(
    file: FileOption,
    days: Annotated[int, typer.Option("--days", min=1, help="How many days of entries are kept.")],
    as_json: JsonOption = False,
) -> None:
    """Remove entries older than some days, a few at a time, while the server goes on."""
    from service.audit_store import prune as remove

    removed = remove(file, time.time() - days * _DAY)
    if as_json:
        print_json({"removed": removed})
    else:
        typer.echo(f"{removed} entries removed")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    import sqlite3

    from service.audit_store import audit_error, open_for_reading

    with contextlib.closing(open_for_reading(file)) as connection:
        try:
            yield connection
        except sqlite3.Error as error:
            raise audit_error(file, f"{error}") from error


def _lines(file: Path, selection: Selection) -> Iterator[str]:
    import json

    from service.audit_store import read

    with _reading(file) as connection:
        for entries in read(connection, selection):
            yield "".join(f"{json.dumps(entry, allow_nan=False)}\n" for entry in entries)


def _time(name: str, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
        unix = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        unix = math.nan
    if not math.isfinite(unix):
        raise typer.BadParameter(f"{value!r} is not a time such as 2026-03-01T12:00:00Z", param_hint=name)
    return unix

"""The group `spool`: what the server's spool holds, marks on it, and what is removed from it."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.spool import Mark, SpoolItem

__all__ = ["build_app"]

_DAY = 86400.0
_MEGABYTE = 1024 * 1024
_LARGEST = 2**63 - 1  # what SQLite counts to


class MarkChoice(StrEnum):
    """What can be said of a judgement."""

    FALSE_POSITIVE = "false_positive"
    MISS = "miss"
    CORRECT = "correct"


class WhyChoice(StrEnum):
    """Why an item is kept."""

    SAMPLED = "sampled"
    VERDICT = "verdict"


FileOption = Annotated[
    Path, typer.Option("--file", metavar="FILE", envvar="SAILGUARD_SPOOL", help="The file of the setting `spool`.")
]
ItemArgument = Annotated[int, typer.Argument(metavar="ITEM", min=1, max=_LARGEST, help="Number of the item.")]


def build_app() -> typer.Typer:
    """The group `spool`."""
    app = typer.Typer(help="Read the server's spool, mark what it judged, and remove old items.", no_args_is_help=True)
    app.command("list")(list_items)
    app.command()(show)
    app.command()(mark)
    app.command()(stats)
    app.command()(prune)
    return app


def list_items(
    file: FileOption,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 50,
    before: Annotated[
        int | None, typer.Option(metavar="ITEM", min=1, max=_LARGEST, help="Only items before this one.")
    ] = None,
    why: Annotated[WhyChoice | None, typer.Option(help="Only those kept for this.")] = None,
    flagged: Annotated[str | None, typer.Option(metavar="DOMAIN", help="Only those flagged for it.")] = None,
    marked: Annotated[
        bool | None, typer.Option("--marked/--unmarked", help="Only those with marks, or without.")
    ] = None,
    request_id: Annotated[str | None, typer.Option("--request", metavar="ID", help="Only those of a request.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List items, the newest first."""
    from feature_bank.spool import Selection, Spool, iso

    selection = Selection(why=None if why is None else why.value, flagged=flagged, marked=marked, request_id=request_id)
    with Spool.open_for_reading(file) as spool:
        found = [(item, spool.marks(item.id or 0)) for item in spool.newest(selection, limit=limit, before=before)]
    if as_json:
        print_json([_shown(item, marks) for item, marks in found])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("item", "time", "endpoint", "phase", "action"):
        table.add_column(name, no_wrap=True, justify="right" if name == "item" else "left")
    for name in ("flagged", "marks"):
        table.add_column(name, overflow="fold")
    for item, marks in found:
        last = {mark.domain: mark.mark for mark in marks}
        table.add_row(
            str(item.id),
            iso(item.unix)[:16].replace("T", " "),
            plain(item.endpoint),
            item.phase,
            item.action,
            plain(", ".join(item.flagged)) or "-",
            plain(", ".join(f"{domain}: {said}" for domain, said in last.items())) or "-",
        )
    output_console().print(table, markup=False)


def show(item: ItemArgument, file: FileOption, as_json: JsonOption = False) -> None:
    """Show one item, with its marks and the features that were strongest in it as numbers of the bank's rows."""
    from feature_bank.spool import Spool, iso

    with Spool.open_for_reading(file) as spool:
        found = _found(spool.item(item), item, file)
        marks = spool.marks(item)
    peaks = found.activations().acts.max(0, initial=0.0)
    strongest = [(int(row), round(float(peaks[row]), 4)) for row in (-peaks).argsort(kind="stable")[:10] if peaks[row]]
    if as_json:
        print_json({**_shown(found, marks), "strongest": [{"row": row, "peak": peak} for row, peak in strongest]})
        return
    console = output_console()
    facts: dict[str, object] = {
        "item": found.id,
        "time": iso(found.unix),
        "request": f"{found.request_id} ({found.endpoint}, number {found.choice}, {found.phase})",
        "judged": "token by token" if found.streamed else "as a whole",
        "action": found.action,
        "scores": ", ".join(f"{domain} {score:.3f}" for domain, score in found.scores.items()),
        "flagged": ", ".join(found.flagged) or "-",
        "kept as": found.why,
        "bank": found.bank,
        "policy": found.policy,
        "model": found.model,
        "strongest": ", ".join(f"row {row}: {peak:g}" for row, peak in strongest) or "-",
        "text": "not kept" if found.text is None else found.text,
    }
    for name, value in facts.items():
        console.print(f"{name:<10}{plain(str(value))}", markup=False, soft_wrap=True)
    for one in marks:
        said = f"{iso(one.unix)}  {one.domain}: {one.mark} by {one.reviewer} {one.reason}"
        console.print(f"{'mark':<10}{plain(said)}", markup=False, soft_wrap=True)


def mark(
    item: ItemArgument,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN", help="The domain that is spoken of.")],
    said: Annotated[MarkChoice, typer.Argument(metavar="MARK", help="false_positive, miss or correct.")],
    file: FileOption,
    reviewer: Annotated[
        str, typer.Option("--reviewer", metavar="NAME", envvar="SAILGUARD_REVIEWER", help="Who says it.")
    ],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why.")] = "",
) -> None:
    """Say of an item whether it was judged rightly. Nothing is overwritten: the last mark of a domain counts."""
    from feature_bank.spool import Spool

    with Spool.open_existing(file) as spool:
        made = spool.mark(item, domain, said.value, reviewer=reviewer, reason=reason)
    typer.echo(f"item {made.item}, {made.domain}: {made.mark}")


def stats(file: FileOption, as_json: JsonOption = False) -> None:
    """Count items and marks, by what they say and by the versions that said it."""
    from feature_bank.spool import Spool

    with Spool.open_for_reading(file) as spool:
        found = {**spool.statistics(), "bytes": file.stat().st_size}
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    console = output_console()
    console.print(
        f"items     {found['items']} ({found['with_text']} with text), {found['tokens']} tokens, {found['bytes']} bytes"
    )
    console.print(f"marks     {found['marks']} on {found['marked_items']} items")
    if not found["items"]:
        return
    console.print(f"from      {found['first']}\nto        {found['last']}\n")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("by")
    table.add_column("value", overflow="fold")
    table.add_column("items", justify="right", no_wrap=True)
    for column, counts in found["by"].items():
        for value, count in counts.items():
            table.add_row(column, plain(value) or "-", str(count))
    for domain, counts in found["marked"].items():
        for value, count in counts.items():
            table.add_row(plain(domain), value, str(count))
    console.print(table, markup=False)


def prune(
    file: FileOption,
    days: Annotated[
        int | None, typer.Option("--days", min=1, max=_LARGEST, help="How many days of items are kept.")
    ] = None,
    megabytes: Annotated[
        int | None,
        typer.Option("--max-megabytes", min=1, help="Remove the oldest unmarked items until the file holds this much."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove items a few at a time, while the server goes on: those that are too old, or too many."""
    from feature_bank.spool import Spool
    from feature_bank.spool_retention import prune as remove

    if days is None and megabytes is None:
        raise typer.BadParameter("say what is kept: --days or --max-megabytes")
    with Spool.open_existing(file) as spool:
        removed = remove(
            spool,
            before=None if days is None else time.time() - days * _DAY,
            most=None if megabytes is None else megabytes * _MEGABYTE,
        )
    if as_json:
        print_json({"removed": removed})
    else:
        typer.echo(f"{removed} items removed")


def _found(item: SpoolItem | None, number: int, file: Path) -> SpoolItem:
    from feature_bank.spool import SpoolError

    if item is None:
        raise SpoolError(f"spool file {str(file)!r}: there is no item {number}")
    return item


def _shown(item: SpoolItem, marks: list[Mark]) -> dict[str, Any]:
    from dataclasses import asdict

    from feature_bank.spool import iso

    shown = {name: getattr(item, name) for name in item.__slots__ if name not in ("acts", "file", "unix")}
    said = [
        {**{name: value for name, value in asdict(one).items() if name not in ("unix", "item")}, "time": iso(one.unix)}
        for one in marks
    ]
    return {"id": item.id, "time": iso(item.unix), **shown, "flagged": list(item.flagged), "marks": said}

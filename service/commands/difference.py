"""`bank diff`: what turns one bank into another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from service.commands.bank_reader import read_bank
from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from feature_bank.difference import BankDifference, Change

__all__ = ["diff", "write_difference"]

_WEIGHTS_SHOWN = 10


def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="Bank folder.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Bank folder.")],
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 1 if there is a difference.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what differs from bank A to bank B: features, labels, admission, heads, thresholds, quality, origin.

    Labels are those that the banks record; reviews that wait for a refit do not count.
    """
    from feature_bank.difference import compare_banks

    found = compare_banks(read_bank(before), read_bank(after))
    if as_json:
        print_json(asdict(found))
    elif found.same:
        output_console().print("no difference")
    else:
        _print(found)
    if exit_code and not found.same:
        raise typer.Exit(1)


def write_difference(found: BankDifference, file: TextIO) -> None:
    """What `bank diff` prints, into a file."""
    from rich.console import Console

    _print(found, Console(file=file, width=160, no_color=True))


def _print(found: BankDifference, console: Console | None = None) -> None:
    console = output_console() if console is None else console
    console.print(f"{found.before} -> {found.after}", markup=False, soft_wrap=True)
    empty = True
    for title, table in _tables(found):
        if table.row_count:
            empty = False
            console.print(f"\n{title}", style="bold", markup=False)
            console.print(table)
    if empty:
        console.print("the files differ in nothing that is compared", style="dim")


def _tables(found: BankDifference) -> Iterator[tuple[str, Table]]:
    for title, lines in (("features in", found.features_in), ("features out", found.features_out)):
        rows = ((line.id, ", ".join(line.domains), line.explanation) for line in lines)
        yield f"{title}: {len(lines)}", _table(("feature", "domains", "explanation"), rows)
    yield (
        f"relabelled: {len(found.relabelled)}",
        _table(
            ("feature", "field", "before", "after"),
            (
                (feature, change.name, _shown(change.before), _shown(change.after))
                for feature, changes in found.relabelled.items()
                for change in changes
            ),
        ),
    )
    yield f"admitted: {len(found.admitted)} changed", _changes_table("feature", found.admitted)
    yield (
        "remeasured",
        _table(("field", "features"), ((name, str(count)) for name, count in found.remeasured.items()), figures=1),
    )
    yield "heads", _heads_table(found)
    for head in found.heads:
        shown = head.weights[:_WEIGHTS_SHOWN]
        title = f"weights of {head.domain}: {len(head.weights)} changed"
        title += f", the {len(shown)} largest changes" if len(shown) < len(head.weights) else ""
        yield title, _changes_table("feature", shown, moves=True)
    moves = (
        (move.domain, move.kind, f"{float(move.rate):g}", *_figures(move.before, move.after))
        for move in found.thresholds
    )
    columns = ("domain", "texts", "false-positive rate", "before", "after", "move")
    yield "thresholds", _table(columns, moves, figures=3)
    yield "quality", _changes_table("measured", found.quality, moves=True)
    yield "model", _changes_table("field", found.model)
    yield "hook points", _changes_table("field", found.hook_points)
    yield "origin", _changes_table("field", found.origin)


def _heads_table(found: BankDifference) -> Table:
    rows = (
        (
            head.domain,
            str(len(head.features_in)),
            str(len(head.features_out)),
            str(len(head.weights)),
            ", ".join(f"{c.name} {_shown(c.before)} -> {_shown(c.after)}" for c in head.others if " " not in c.name),
        )
        for head in found.heads
    )
    return _table(("domain", "features in", "features out", "weights changed", "and"), rows)


def _changes_table(what: str, changes: Iterable[Change], *, moves: bool = False) -> Table:
    """moves: the values are numbers, and how far each moved is shown."""
    if moves:
        rows: Iterable[Sequence[str]] = ((change.name, *_figures(change.before, change.after)) for change in changes)
        return _table((what, "before", "after", "move"), rows, figures=3)
    return _table((what, "before", "after"), ((c.name, _shown(c.before), _shown(c.after)) for c in changes))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: int = 0) -> Table:
    """figures: how many of the last columns are numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number >= len(columns) - figures else "left")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def _figures(before: float | None, after: float | None) -> tuple[str, str, str]:
    move = "-" if before is None or after is None else f"{after - before:+.4g}"
    return _shown(before), _shown(after), move


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value if not isinstance(part, dict)) or f"{len(value)} entries"
    if isinstance(value, dict):
        return f"{len(value)} fields"
    return str(value)

"""`bank promote`, `rollback` and `versions`: which version of a bank is the current one of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.bank_reader import place_of
from service.commands.options import BankArgument, JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.versions import Switch

__all__ = ["list_versions", "promote", "rollback"]

StoreOption = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder that holds the versions.")]


def promote(store: StoreOption, path: BankArgument = None, as_json: JsonOption = False) -> None:
    """Copy a bank into a folder of versions, verified, and make it the current one.

    Reviews of the version that was current are carried over. `--bank DIR` then means the current version.
    """
    from feature_bank.versions import VersionStore

    _report(VersionStore(store).promote(place_of(path)), as_json)


def rollback(
    store: StoreOption,
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="Default: the one before the current one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an earlier version the current one again. Reviews are carried over; no version is deleted."""
    from feature_bank.versions import VersionStore

    _report(VersionStore(store).rollback(to), as_json)


def list_versions(store: StoreOption, as_json: JsonOption = False) -> None:
    """List the versions in a folder, in the order they came there; each is verified. Exit code 1 if one is damaged."""
    from feature_bank.review import load_labels
    from feature_bank.versions import VersionStore

    rows = []
    for stored in VersionStore(store).versions():
        log = load_labels(stored.folder, stored.bank)[0] if stored.bank is not None else None
        manifest = stored.bank.manifest if stored.bank is not None else None
        rows.append(
            {
                "version": stored.version,
                "current": stored.current,
                "since": stored.since and f"{stored.since[:19]}Z",
                "created": manifest and manifest.created,
                "parent": manifest and manifest.parent,
                "features": stored.bank and len(stored.bank.features),
                "reviews": log and len(log.reviews),
                "content_hash": stored.bank and stored.bank.content_hash,
                "problem": stored.problem,
            }
        )
    if as_json:
        print_json(rows)
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "version", "since", "created", "parent"):
            table.add_column(name, overflow="fold")  # a name that is cut short could not be asked for
        for name in ("features", "reviews"):
            table.add_column(name, justify="right")
        for row in rows:
            cells = (row[key] for key in ("version", "since", "created", "parent", "features", "reviews"))
            table.add_row("*" if row["current"] else "", *("-" if v is None else plain(str(v)) for v in cells))
        console = output_console()
        console.print(table)
        for row in rows:
            if row["problem"]:
                console.print(f"damaged: {row['version']}: {plain(str(row['problem']))}", markup=False, soft_wrap=True)
    if any(row["problem"] for row in rows):
        raise typer.Exit(1)


def _report(switch: Switch, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "version": switch.version,
                "previous": switch.previous,
                "changed": switch.changed,
                "reviews_carried": switch.carried,
            }
        )
        return
    before = f" (before: {switch.previous})" if switch.changed and switch.previous else ""
    line = f"{switch.version} is {'now ' if switch.changed else ''}the current version{before}"
    carried = f"; {switch.carried} reviews carried over" if switch.carried else ""
    output_console().print(line + carried, markup=False, soft_wrap=True)

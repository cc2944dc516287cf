"""`keys new`, `list` and `revoke`: the keys file of the server, in which keys are hashed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import JsonOption
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["build_app"]

_VARIABLE = "SAILGUARD_API_KEYS_FILE"

FileOption = Annotated[Path, typer.Option("--file", metavar="FILE", envvar=_VARIABLE, help="The keys file.")]


class KeyRole(StrEnum):
    """What the owner of a key may do."""

    CLIENT = "client"
    READER = "reader"
    ADMIN = "admin"


def build_app() -> typer.Typer:
    """The group `keys`."""
    app = typer.Typer(help="Make, list and revoke the API keys of the server.", no_args_is_help=True)
    app.command()(new)
    app.command("list")(list_keys)
    app.command()(revoke)
    return app


def new(
    key_id: Annotated[str, typer.Option("--id", metavar="ID", help="Name of the key in the log and the audit.")],
    role: Annotated[
        KeyRole,
        typer.Option(
            "--role",
            help="client: judge and generate. reader: metrics, events, features, models. admin: everything.",
        ),
    ] = KeyRole.CLIENT,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="N/PERIOD", help="Its own rate limit, such as 600/minute.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", min=1, max=100_000, help="Requests that it may have open at a time.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", envvar=_VARIABLE, help="The keys file. Without one, print its line."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once: the file holds its digest. A running server takes it up by itself."""
    from service.key_file import Principal, Role, add_key, hashed_line, new_key

    key = new_key()
    principal = Principal(key_id=key_id, role=Role(role.value), rate=rate, concurrent=concurrent)
    line = hashed_line(key, principal)
    if file is not None:
        add_key(file, line)
    if as_json:
        print_json({"key": key, "id": key_id, "role": role.value, "file": file and str(file), "line": line})
        return
    typer.echo(key)
    if file is None:
        _say(error_console(), "its line for a keys file:")
        typer.echo(line)
    else:
        _say(error_console(), f"key {key_id!r} ({role.value}) is in {file}; it is shown only here")


def list_keys(file: FileOption, as_json: JsonOption = False) -> None:
    """List the keys of a file: ids, roles and limits. Neither keys nor whole digests are shown."""
    from service.key_file import KeyFile

    rows: list[dict[str, Any]] = [
        {
            "id": key.principal.key_id,
            "role": key.principal.role.value,
            "rate": key.principal.rate,
            "concurrent": key.principal.concurrent,
            "stored": "plain" if key.plain else "hashed",
            "digest": f"{key.digest.hex()[:8]}...",
        }
        for key in KeyFile.read(file).keys
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("id", "role", "rate", "concurrent", "stored", "digest"):
        table.add_column(name, overflow="fold", justify="right" if name == "concurrent" else "left")
    for row in rows:
        table.add_row(*("-" if value is None else plain(str(value)) for value in row.values()))
    output_console().print(table)


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as `keys list` shows it.")],
    file: FileOption,
) -> None:
    """Take a key out of a file. A running server refuses it as soon as it has read the file again."""
    from service.key_file import remove_key

    left = remove_key(file, key_id)
    note = "" if left else "; no key is left, so a running server refuses all, and none can start with this file"
    _say(output_console(), f"key {key_id!r} is revoked, {left} left{note}")


def _say(console: Console, text: str) -> None:
    console.print(plain(text), markup=False, soft_wrap=True)

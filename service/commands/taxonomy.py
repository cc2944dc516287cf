"""`taxonomy check` and `list`: the domains' concepts and contrast pairs, and whether they can teach what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from feature_bank.taxonomy import load_taxonomy
from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

__all__ = ["build_app"]

FolderArgument = Annotated[
    Path | None, typer.Argument(metavar="FOLDER", help="Folder of DOMAIN.yaml files. Default: the shipped ones.")
]


def build_app() -> typer.Typer:
    """The group `taxonomy`."""
    app = typer.Typer(help="Look into the taxonomy of concepts and contrast pairs.", no_args_is_help=True)
    app.command()(check)
    app.command("list")(list_concepts)
    return app


def check(folder: FolderArgument = None, as_json: JsonOption = False) -> None:
    """Check form, balance and uniqueness, and that neither length nor function words tell the sides of pairs apart.

    Exit code 1 if anything was found.
    """
    from training.taxonomy_checks import findings, shortcuts

    taxonomy = load_taxonomy(folder)
    measured = shortcuts(taxonomy)
    found = [*findings(taxonomy), *(line for shortcut in measured for line in shortcut.findings)]
    if as_json:
        from dataclasses import asdict

        print_json({"shortcuts": [asdict(shortcut) for shortcut in measured], "findings": found})
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("domain", "language", "pairs", "length: AUROC", "function words: AUROC"):
            table.add_column(name, justify="left" if name in ("domain", "language") else "right")
        for shortcut in measured:
            values = (f"{value:.3f}" for value in (shortcut.length_auroc, shortcut.function_words_auroc))
            table.add_row(shortcut.domain, shortcut.lang, str(shortcut.pairs), *values)
        console = output_console()
        console.print(table)
        for line in found:
            console.print(plain(line), markup=False, soft_wrap=True)
        if not found:
            console.print("nothing to complain of")
    if found:
        raise typer.Exit(1)


def list_concepts(folder: FolderArgument = None, as_json: JsonOption = False) -> None:
    """List every concept with its definition and the number of its pairs."""
    taxonomy = load_taxonomy(folder)
    rows = [
        {
            "domain": record.domain,
            "subtopic": subtopic.id,
            "concept": concept.id,
            "name": concept.name,
            "definition": concept.definition,
            "pairs": dict(Counter(pair.lang for pair in concept.pairs)),
            "hard_negatives": len(concept.hard_negatives),
        }
        for record in taxonomy.values()
        for subtopic in record.subtopics
        for concept in subtopic.concepts
    ]
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("domain", "subtopic", "concept", "definition"):
        table.add_column(name)
    for name in ("en", "zh"):
        table.add_column(name, justify="right")
    for row in rows:
        pairs = row["pairs"]
        assert isinstance(pairs, dict)
        cells = (plain(str(row[key])) for key in ("domain", "subtopic", "concept", "definition"))
        table.add_row(*cells, str(pairs.get("en", 0)), str(pairs.get("zh", 0)))
    output_console().print(table)

"""`bank report`: a feature bank as one HTML page that can be read, kept and sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

__all__ = ["report"]


def report(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="The page to write.")],
    path: Annotated[Path | None, typer.Argument(metavar="BANK", help="Bank folder. Default: the shipped one.")] = None,
    selection: Annotated[
        Path | None,
        typer.Option(
            "--selection", metavar="FOLDER", help="What `sailguard train select` wrote; its plot joins the page."
        ),
    ] = None,
    taxonomy: Annotated[
        Path | None,
        typer.Option(
            "--taxonomy", metavar="FOLDER", help="Concepts to look for, as DOMAIN.yaml. Default: the shipped ones."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page of a bank: its figures, and a card for every feature."""
    from feature_bank.bank import shipped_bank_path
    from feature_bank.report import write_report

    written = write_report(
        path if path is not None else shipped_bank_path(),
        out,
        selection=selection,
        taxonomy=taxonomy,
        overwrite=overwrite,
    )
    if as_json:
        print_json(
            {
                "report": str(written.path),
                "bank": written.bank,
                "features": written.features,
                "bytes": written.size,
            }
        )
        return
    line = f"{written.path}: {written.features:,} features of {written.bank}, {written.size / 1e6:.1f} MB"
    output_console().print(plain(line), markup=False, soft_wrap=True)

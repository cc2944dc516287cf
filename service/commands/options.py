"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BankArgument",
    "BankOption",
    "DataOption",
    "JsonOption",
    "ModelOption",
    "PolicyOption",
    "RoleOption",
    "TextRole",
]


class TextRole(StrEnum):
    """How a text is read: in the chat template as a user's message, or as plain text."""

    PROMPT = "prompt"
    RESPONSE = "response"
    PASSAGE = "passage"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER|HUB-ID", help="Model to load. Default: the embedded one."),
]
BankArgument = Annotated[Path | None, typer.Argument(metavar="BANK", help="Bank folder. Default: the shipped one.")]
BankOption = Annotated[
    Path | None, typer.Option("--bank", metavar="FOLDER", help="Feature bank. Default: the shipped one.")
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="Policy file (YAML), or monitor, balanced or strict. Default: the built-in one.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
RoleOption = Annotated[
    TextRole,
    typer.Option("--role", help="Judge the text as a user's prompt, as a model's response or as a plain passage."),
]
DataOption = Annotated[
    list[Path],
    typer.Option("--data", metavar="FILE", help="JSON lines, gzipped or not. May be given several times."),
]

"""Reading from and writing to the terminal: consoles, JSON, and text that nobody has vouched for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from guard.events import FeatureHit, Verdict

__all__ = [
    "ACTION_STYLES",
    "error_console",
    "features_table",
    "output_console",
    "plain",
    "print_json",
    "read_argument",
    "verdict_line",
]

ACTION_STYLES: Mapping[str, str] = {
    "allow": "green",
    "flag": "yellow",
    "steer": "magenta",
    "block": "bold red",
}

# Everything by which a text could drive the terminal: control characters but for tab and newline, and the
# marks that reorder what is shown. Lone surrogates cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def output_console() -> Console:
    """A console on standard output, made anew so that it follows redirection."""
    from rich.console import Console

    return Console(highlight=False)


def error_console() -> Console:
    """A console on standard error: progress, notes and errors, which are no part of the output."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def plain(text: str) -> str:
    """Text of a user or a model as it may be printed: what a terminal would obey becomes U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def print_json(data: Any, *, lines: bool = False) -> None:
    """Print `data` as ASCII JSON, indented, or on one line if it is one of many."""
    typer.echo(json.dumps(data, indent=None if lines else 2))


def read_argument(text: str) -> str:
    """The text itself, or all of standard input if it is `-`. Bytes that are not UTF-8 become U+FFFD."""
    if text != "-":
        return text
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def features_table(rows: Iterable[tuple[str, FeatureHit]]) -> Table:
    """A table of (domain, feature) pairs with their explanations."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (
        ("domain", "left"),
        ("feature", "left"),
        ("activation", "right"),
        ("adds", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # a plain str is taken
    table.add_column("explanation")
    for domain, hit in rows:
        table.add_row(
            domain,
            hit.id,
            f"{hit.activation:.2f}",
            f"{hit.contribution:+.2f}",
            Text(plain(hit.explanation)),
        )
    return table


def verdict_line(verdict: Verdict, *, features: int = 1) -> str:
    """A verdict in one line of plain text, with its strongest features."""
    reasons = "; ".join(plain(f"{hit.id} {hit.explanation}") for hit in verdict.features[:features])
    line = (
        f"{verdict.action} {verdict.domain}: {verdict.phase} token {verdict.token_index}, "
        f"score {verdict.score:.3f}, threshold {verdict.threshold:.3f}"
    )
    return f"{line} ({reasons})" if reasons else line

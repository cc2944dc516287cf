"""`check` and `trace`: one text, judged as a whole or token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.options import (
    BankOption,
    JsonOption,
    ModelOption,
    PolicyOption,
    RoleOption,
    TextRole,
)
from service.commands.session import opened
from service.commands.terminal import (
    ACTION_STYLES,
    error_console,
    features_table,
    output_console,
    plain,
    print_json,
    read_argument,
)

if TYPE_CHECKING:
    from rich.table import Table

    from guard.events import FeatureHit, TextScore, Trace

__all__ = ["check", "trace"]

TextArgument = Annotated[str, typer.Argument(help="The text, or - to read it from standard input.")]


def check(
    text: TextArgument,
    role: RoleOption = TextRole.PROMPT,
    model: ModelOption = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge one text: scores by domain, and the features behind them.

    Exit code 0: allowed. 1: a rule of the policy fired. 2: an error.
    """
    content = read_argument(text)
    with opened(model, bank, policy) as attached:
        (score,) = attached.score([content], [role.value])
        guard = attached.guard
        if as_json:
            versions = {"bank": guard.bank.version, "policy": guard.policy.version}
            print_json({"role": role.value, **score.to_dict(), **versions})
        else:
            _print_score(score)
    raise typer.Exit(1 if score.verdicts else 0)


def trace(
    text: TextArgument,
    role: RoleOption = TextRole.PROMPT,
    model: ModelOption = None,
    bank: BankOption = None,
    policy: PolicyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the guard sees at every token: scores by domain, and the strongest features."""
    content = read_argument(text)
    with opened(model, bank, policy) as attached:
        traced = attached.trace(content, role.value)
        domains = list(attached.guard.bank.heads)
    if as_json:
        print_json({"role": role.value, **traced.to_dict()})
        return
    output_console().print(_trace_table(traced, domains))
    _note_truncation(traced.score)


def _print_score(score: TextScore) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("domain", "score", "flagged", "action"):
        table.add_column(name, justify="right" if name == "score" else "left")
    by_score = sorted(score.scores, key=score.scores.__getitem__, reverse=True)
    for domain in by_score:
        action = domain_action(score, domain)
        style = ACTION_STYLES[action]
        table.add_row(
            domain,
            f"{score.scores[domain]:.3f}",
            "yes" if score.flagged[domain] else "no",
            f"[{style}]{action}[/]",
        )
    console = output_console()
    console.print(table)
    shown = [domain for domain in by_score if score.flagged[domain]] or by_score[:1]
    hits: list[tuple[str, FeatureHit]] = [(domain, hit) for domain in shown for hit in score.features[domain]]
    if hits:
        console.print()
        console.print(features_table(hits))
    style = ACTION_STYLES[score.action]
    console.print(f"\n[{style}]{score.action}[/] ({score.tokens} tokens)")
    _note_truncation(score)


def domain_action(score: TextScore, domain: str) -> str:
    """The most severe action of the rules that fired for one domain; `allow` if none did."""
    from guard.events import SEVERITY

    actions = (verdict.action for verdict in score.verdicts if verdict.domain == domain)
    return max(actions, key=SEVERITY.__getitem__, default="allow")


def _note_truncation(score: TextScore) -> None:
    if score.truncated:
        error_console().print("note: the text is longer than the model's context; only its beginning was judged")


def _trace_table(traced: Trace, domains: list[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("token", no_wrap=True)
    for domain in domains:
        table.add_column(domain, justify="right", no_wrap=True)
    table.add_column("strongest feature")
    for token in traced.tokens:
        strongest = token.features[0] if token.features else None
        table.add_row(
            str(token.index),
            Text(plain(repr(token.text)[1:-1])),
            *(_cell(token.scores.get(domain)) for domain in domains),
            Text(plain(f"{strongest.id} ({strongest.activation:.2f}) {strongest.explanation}") if strongest else ""),
            style=None if token.observed else "dim",
        )
    return table


def _cell(score: float | None) -> str:
    if score is None:
        return "-"
    style = "red" if score >= 0.5 else "yellow" if score >= 0.1 else "dim"
    return f"[{style}]{score:.3f}[/]"

"""The group `bank`, and of it `info` and `verify`: what a feature bank holds, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands import bank_interop, card, difference, features, review, versions
from service.commands.bank_reader import read_bank, read_labelled
from service.commands.bank_report import report
from service.commands.options import BankArgument, JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from feature_bank.bank import Bank
    from feature_bank.review import EffectiveLabel

__all__ = ["build_app"]


def build_app() -> typer.Typer:
    """The group `bank`."""
    app = typer.Typer(help="Look into a feature bank, review it, and keep its versions.", no_args_is_help=True)
    app.command()(info)
    app.command("list")(features.list_features)
    app.command("search")(features.search_features)
    app.command()(card.show)
    app.command()(verify)
    app.command()(review.review)
    app.command("diff")(difference.diff)
    app.command()(versions.promote)
    app.command()(versions.rollback)
    app.command("versions")(versions.list_versions)
    bank_interop.add_commands(app)
    app.command()(report)
    return app


def info(path: BankArgument = None, as_json: JsonOption = False) -> None:
    """Summarise a bank: its model, hook points, corpora, domains, measured quality and reviews."""
    bank, log, labels = read_labelled(path)
    manifest = bank.manifest
    if as_json:
        domains = {domain: len(head.features) for domain, head in bank.heads.items()}
        print_json(
            {
                "version": bank.version,
                "content_hash": bank.content_hash,
                "features": len(bank.features),
                "features_by_head": domains,
                "thresholds": {domain: head.thresholds for domain, head in bank.heads.items()},
                "streaming_thresholds": {domain: head.streaming_thresholds for domain, head in bank.heads.items()},
                "reviews": {"given": len(log.reviews), **_review_counts(bank, labels)},
                "manifest": manifest.model_dump(),
            }
        )
        return
    console = output_console()
    facts = {
        "bank": bank.version,
        "model": f"{manifest.model.id} ({manifest.model.n_layers} layers, width {manifest.model.d_model})",
        "features": str(len(bank.features)),
        "made": f"{manifest.created} by sailguard {manifest.tool_version}",
        "sha256": bank.content_hash,
        "reviews": _reviews_line(len(log.reviews), _review_counts(bank, labels)),
    }
    for name, value in facts.items():
        console.print(f"{name:<9} {plain(value)}", markup=False, soft_wrap=True)
    for table in (_hooks_table(bank), _heads_table(bank), _corpora_table(bank), _quality_table(bank)):
        if table.row_count:
            console.print()
            console.print(table)


def verify(
    path: BankArgument = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Also check that this model is the bank's; a folder, hub id or `embedded`.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a bank's schema and hashes; with --model also the model, its tokenizer and its activations."""
    bank = read_bank(path)
    checked = ["schema", "hashes"]
    if model is not None:
        _check_model(bank, None if model == "embedded" else model)
        checked += ["identity", "canary"]
    if as_json:
        print_json({"bank": bank.version, "content_hash": bank.content_hash, "verified": checked})
    else:
        output_console().print(f"{bank.version}: {', '.join(checked)} verified", markup=False, soft_wrap=True)


def _review_counts(bank: Bank, labels: Mapping[str, EffectiveLabel]) -> dict[str, int]:
    from feature_bank.review import pending

    status = Counter(label.status for label in labels.values())
    waiting = pending(bank, labels)
    return {
        "accepted": status["accepted"],
        "rejected": status["rejected"],
        "pending_rejected": len(waiting.rejected),
        "pending_relabelled": len(waiting.relabelled),
    }


def _reviews_line(given: int, counts: Mapping[str, int]) -> str:
    if not given:
        return "none"
    line = f"{given}; {counts['accepted']} features accepted, {counts['rejected']} rejected"
    rejected, relabelled = counts["pending_rejected"], counts["pending_relabelled"]
    if not rejected + relabelled:
        return line
    return (
        f"{line}. Not in this version yet: {rejected} rejected features still in a head, {relabelled} new labels; "
        "`sailguard train refit` makes the next one"
    )


def _check_model(bank: Bank, model: str | None) -> None:
    from feature_bank.identity import check_identity
    from guard.canary import check_canary
    from guard.encoder import SelectedEncoder
    from guard.models import load_model

    loaded = load_model(model)
    check_identity(loaded.model, loaded.tokenizer, bank.manifest.model)
    device = next(loaded.model.parameters()).device
    check_canary(bank, SelectedEncoder(bank, device), loaded.model, loaded.tokenizer)


def _new_table(text: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in text:
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _hooks_table(bank: Bank) -> Table:
    table = _new_table(
        ("hook point",), ("features", "directions", "SAE width", "fvu", "l0", "dead", "precision", "recall")
    )
    for hook in bank.manifest.hook_points:
        table.add_row(
            hook.hook_name,
            str(hook.n_selected),
            str(hook.n_directions),
            str(hook.d_sae),
            *(f"{v:.3f}" for v in (hook.fvu, hook.l0, hook.dead_fraction, hook.fires_precision, hook.fires_recall)),
        )
    return table


def _heads_table(bank: Bank) -> Table:
    rates = sorted({rate for head in bank.heads.values() for rate in head.thresholds}, key=float)
    table = _new_table(("domain",), ("in head", "tagged", *(f"thresholds {float(r):g}" for r in rates)))
    for domain, head in bank.heads.items():
        tagged = sum(domain in feature.domains for feature in bank.features)
        both = (head.thresholds, head.streaming_thresholds)  # for text that lies there whole, and that streams
        thresholds = (" / ".join(f"{t[r]:.3f}" if r in t else "-" for t in both) for r in rates)
        table.add_row(domain, str(len(head.features)), str(tagged), *thresholds)
    return table


def _corpora_table(bank: Bank) -> Table:
    table = _new_table(("corpus", "licence"), ("rows",))
    for corpus in bank.manifest.corpus:
        table.add_row(plain(corpus.name), plain(corpus.licence), str(corpus.rows))
    return table


def _quality_table(bank: Bank) -> Table:
    table = _new_table(("measured",), ("value",))
    for name, value in bank.manifest.quality.items():
        table.add_row(plain(name), f"{value:.4g}")
    return table

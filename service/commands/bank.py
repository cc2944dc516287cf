"""`bank info`, `list`, `show` and `verify`: what a feature bank holds, and whether it is whole."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feature_bank.errors import BankError
from service.commands.bank_report import report
from service.commands.options import JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from feature_bank.bank import Bank
    from feature_bank.schema import FeatureRecord

__all__ = ["build_app"]

PathArgument = Annotated[Path | None, typer.Argument(metavar="BANK", help="Bank folder. Default: the shipped one.")]


class SortKey(StrEnum):
    """By what a list of features is ordered."""

    BANK = "bank"
    AUROC = "auroc"
    DENSITY = "density"
    LAYER = "layer"


def build_app() -> typer.Typer:
    """The group `bank`."""
    app = typer.Typer(help="Look into a feature bank.", no_args_is_help=True)
    app.command()(info)
    app.command("list")(list_features)
    app.command()(show)
    app.command()(verify)
    app.command()(report)
    return app


def info(path: PathArgument = None, as_json: JsonOption = False) -> None:
    """Summarise a bank: its model, hook points, corpora, domains and measured quality."""
    bank = _load(path)
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
    }
    for name, value in facts.items():
        console.print(f"{name:<9} {plain(value)}", markup=False, soft_wrap=True)
    for table in (_hooks_table(bank), _heads_table(bank), _corpora_table(bank), _quality_table(bank)):
        if table.row_count:
            console.print()
            console.print(table)


def list_features(
    path: PathArgument = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Only features tagged with this domain.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Only features of this layer.")] = None,
    sort: Annotated[SortKey, typer.Option("--sort", help="auroc and density put the largest first.")] = SortKey.AUROC,
    limit: Annotated[int, typer.Option("--limit", min=0, help="How many to show; 0 shows all.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List a bank's features with their explanations. auroc: how well one feature alone finds its domain."""
    bank = _load(path)
    if domain is not None and domain not in bank.heads:
        raise BankError(f"the bank has no domain {domain!r}; it has {', '.join(bank.heads)}", field="--domain")
    chosen = [
        feature
        for feature in bank.features
        if (domain is None or domain in feature.domains) and (layer is None or feature.layer == layer)
    ]
    if sort is SortKey.AUROC:
        chosen.sort(key=lambda feature: _auroc(feature, domain) or 0.0, reverse=True)
    elif sort is SortKey.DENSITY:
        chosen.sort(key=lambda feature: feature.density, reverse=True)
    elif sort is SortKey.LAYER:
        chosen.sort(key=lambda feature: (feature.layer, feature.index))
    shown = chosen[:limit] if limit else chosen
    if as_json:
        print_json([feature.model_dump() for feature in shown])
        return
    console = output_console()
    console.print(_features_table(shown, domain))
    console.print(f"\n{len(shown)} of {len(chosen)} features", style="dim")


def show(
    feature_id: Annotated[str, typer.Argument(metavar="FEATURE", help="Such as L14/123.")],
    path: PathArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Show all that a bank records of one feature."""
    bank = _load(path)
    feature = bank.by_id.get(feature_id)
    if feature is None:
        raise BankError(
            f"the bank has no feature {feature_id!r}; `sailguard bank list` names them",
            file="features.jsonl",
            field="id",
        )
    if as_json:
        print_json(feature.model_dump())
        return
    console = output_console()
    facts = {
        "feature": f"{feature.id} at {feature.hook_name}",
        "explanation": feature.explanation,
        "domains": ", ".join(feature.domains) or "none",
        "concepts": ", ".join(feature.concepts),
        "fires on": f"{feature.density:.4%} of the corpus's tokens, above {feature.threshold:.4g}",
        "scale": f"{feature.scale:.4g} (99.9th percentile)",
        "in heads": ", ".join(f"{d} {w:+.3g}" for d, w in _weights(bank, feature_id).items()),
        "scores": ", ".join(f"{name} {value:.3f}" for name, value in feature.scores.items()),
        "quantiles": ", ".join(f"{name} {value:.3g}" for name, value in feature.quantiles.items()),
        "triggers": ", ".join(f"{t.text!r} (z {t.z:.1f}, {t.documents} documents)" for t in feature.trigger_tokens),
        "n-grams": ", ".join(f"{t.text!r} (z {t.z:.1f}, {t.documents} documents)" for t in feature.ngrams),
        "promotes": ", ".join(map(repr, feature.promoted_tokens)),
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name:<12} {plain(value)}", markup=False, soft_wrap=True)
    for evidence in feature.evidence:
        console.print(f"{'evidence':<12} {evidence.activation:.2f} at {plain(evidence.peak)!r}: ", end="", markup=False)
        console.print(plain(evidence.text), markup=False, soft_wrap=True)


def verify(
    path: PathArgument = None,
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
    bank = _load(path)
    checked = ["schema", "hashes"]
    if model is not None:
        _check_model(bank, None if model == "embedded" else model)
        checked += ["identity", "canary"]
    if as_json:
        print_json({"bank": bank.version, "content_hash": bank.content_hash, "verified": checked})
    else:
        output_console().print(f"{bank.version}: {', '.join(checked)} verified", markup=False, soft_wrap=True)


def _load(path: Path | None) -> Bank:
    from feature_bank.bank import Bank, shipped_bank_path

    return Bank.load(path if path is not None else shipped_bank_path())


def _check_model(bank: Bank, model: str | None) -> None:
    from feature_bank.identity import check_identity
    from guard.canary import check_canary
    from guard.encoder import SelectedEncoder
    from guard.models import load_model

    loaded = load_model(model)
    check_identity(loaded.model, loaded.tokenizer, bank.manifest.model)
    device = next(loaded.model.parameters()).device
    check_canary(bank, SelectedEncoder(bank, device), loaded.model, loaded.tokenizer)


def _auroc(feature: FeatureRecord, domain: str | None) -> float | None:
    """How well the feature finds the domain, or the best of its domains."""
    domains = feature.domains if domain is None else [domain]
    return max((feature.scores[f"auroc_{d}"] for d in domains if f"auroc_{d}" in feature.scores), default=None)


def _weights(bank: Bank, feature_id: str) -> dict[str, float]:
    return {
        domain: head.weights[head.features.index(feature_id)]
        for domain, head in bank.heads.items()
        if feature_id in head.features
    }


def _new_table(text: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in text:
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _hooks_table(bank: Bank) -> Table:
    table = _new_table(("hook point",), ("features", "SAE width", "fvu", "l0", "dead", "precision", "recall"))
    for hook in bank.manifest.hook_points:
        table.add_row(
            hook.hook_name,
            str(hook.n_selected),
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


def _features_table(features: list[FeatureRecord], domain: str | None) -> Table:
    from rich.text import Text

    table = _new_table(("feature", "domains"), ("auroc", "density"))
    table.add_column("explanation")
    for feature in features:
        auroc = _auroc(feature, domain)
        table.add_row(
            feature.id,
            ", ".join(feature.domains),
            "-" if auroc is None else f"{auroc:.3f}",
            f"{feature.density:.4%}",
            Text(plain(feature.explanation)),
        )
    return table

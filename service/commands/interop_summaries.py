"""What imports and exports of features say at their end, and what they may write over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.errors import SailguardError
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from feature_bank.interop.collection import Collection
    from feature_bank.interop.records import Loss

__all__ = ["bank_counts", "check_target", "print_counts", "print_losses", "write_collection"]


def check_target(out: Path, marker: str, kind: str, overwrite: bool) -> None:
    """Refuse to replace what is not of this kind, and that too unless it was asked for."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / marker).is_file():
        raise SailguardError(f"{out}: --out exists and is no {kind}; name a new folder")
    if not overwrite:
        raise SailguardError(
            f"{out}: --out holds a {kind} already; add --overwrite to replace it, or name a new folder"
        )


def write_collection(collection: Collection, out: Path, as_json: bool) -> None:
    """Write a collection and say what it holds and what was lost."""
    from feature_bank.interop.collection import save_collection

    save_collection(out, collection, tool_version=metadata.version("sailguard"))
    counts = collection.counts()
    losses = [loss.model_dump() for loss in collection.losses]
    if as_json:
        summary = {"kind": "collection", "out": str(out), "source": collection.source, "model": collection.model}
        print_json({**summary, **counts, "losses": losses})
        return
    output_console().print(
        f"{counts['features']:,} features, {counts['tagged']:,} with a domain's tag, {counts['masked']:,} with a "
        f"masked explanation, {counts['unexplained']:,} without one",
        markup=False,
        soft_wrap=True,
    )
    print_counts(counts["tagged_by_domain_and_layer"])
    print_losses(collection.losses)


def bank_counts(bank: Bank) -> dict[str, Any]:
    """A bank in figures, by domain, layer and head."""
    by_both: dict[str, dict[int, int]] = {}
    for feature in bank.features:
        for domain in feature.domains:
            by_layer = by_both.setdefault(domain, {})
            by_layer[feature.layer] = by_layer.get(feature.layer, 0) + 1
    return {
        "version": bank.version,
        "features": len(bank.features),
        "by_domain_and_layer": by_both,
        "features_by_head": {domain: len(head.features) for domain, head in bank.heads.items()},
        "quality": bank.manifest.quality,
    }


def print_counts(by_domain_and_layer: Mapping[str, Mapping[int, int]]) -> None:
    """A table of tagged features; a feature with several tags counts for each."""
    from rich.table import Table

    layers = sorted({layer for by_layer in by_domain_and_layer.values() for layer in by_layer})
    if not layers:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("domain")
    for title in (*(f"layer {layer}" for layer in layers), "all"):
        table.add_column(title, justify="right", no_wrap=True)
    for domain, by_layer in by_domain_and_layer.items():
        cells = (str(by_layer.get(layer, 0)) for layer in layers)
        table.add_row(domain, *cells, str(sum(by_layer.values())))
    output_console().print(table)


def print_losses(losses: Iterable[Loss]) -> None:
    """One line a loss."""
    console = output_console()
    for loss in losses:
        console.print(f"lost: {plain(loss.field)} ({loss.count:,}): {plain(loss.reason)}", markup=False, soft_wrap=True)

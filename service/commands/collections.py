"""`bank list`, `bank search` and `bank show` on a feature collection: it has texts and scores, no heads or reviews."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from feature_bank.errors import BankError, DataError
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.interop.collection import Collection
    from feature_bank.interop.records import ImportedFeature

__all__ = ["collection_at", "list_collection", "show_collection"]


def collection_at(path: Path | None, **bank_only: object) -> Collection | None:
    """The collection in a folder; None if that holds none.

    bank_only: options that a collection has nothing for, by name. Raises DataError if one of them was given.
    """
    from feature_bank.interop.collection import holds_collection, load_collection

    if path is None or not holds_collection(path):
        return None
    given = [f"--{name.replace('_', '-')}" for name, value in bank_only.items() if value]
    if given:
        raise DataError(f"{path} is a feature collection, which has no use for {', '.join(given)}; leave that out")
    return load_collection(path)


def list_collection(
    collection: Collection,
    query: str,
    *,
    domain: str | None,
    layer: int | None,
    min_scores: Mapping[str, float],
    limit: int,
    as_json: bool,
) -> None:
    """The features that have all words of the query, in the collection's order.

    Raises BankError for a score that none of its features has.
    """
    known = sorted({name for feature in collection.features for name in feature.scores})
    for name in min_scores:
        if name not in known:
            raise BankError(
                f"the collection has no score {name!r}; it has {', '.join(known) or 'none'}", field="min_scores"
            )
    found = collection.search(query, domain=domain, layer=layer, min_scores=min_scores)
    shown = found[:limit] if limit else found
    if as_json:
        print_json([feature.model_dump() for feature in shown])
        return
    if shown:
        _print_table(shown)
        output_console().print()
    output_console().print(f"{len(shown)} of {len(found)} features", style="dim")


def show_collection(collection: Collection, feature_id: str, as_json: bool) -> None:
    """All that the publisher says of one feature. Raises BankError if there is no such feature."""
    feature = collection.by_id.get(feature_id)
    if feature is None:
        raise BankError(
            f"the collection has no feature {feature_id!r}; `sailguard bank list` names them",
            file="features.jsonl",
            field="id",
        )
    if as_json:
        print_json(feature.model_dump())
        return
    facts = [
        ("feature", feature.id + (f" at {feature.hook_name}" if feature.hook_name else "")),
        ("source", f"{collection.name}, {collection.source}" + (f", {collection.model}" if collection.model else "")),
        ("domains", ", ".join(feature.domains)),
        *((e.kind or "explanation", e.text + (f" ({e.model})" if e.model else "")) for e in feature.explanations),
        ("masked", "the publisher holds the explanation back" if feature.masked else ""),
        ("scores", ", ".join(f"{name} {value:.4g}" for name, value in feature.scores.items())),
        ("density", "" if feature.density is None else f"{feature.density:.4%}"),
        ("maximum", "" if feature.max_activation is None else f"{feature.max_activation:.4g}"),
        ("promotes", " ".join(map(repr, feature.promoted_tokens))),
        ("suppresses", " ".join(map(repr, feature.suppressed_tokens))),
        *(("example", "".join(example.tokens)) for example in feature.examples),
    ]
    for name, value in facts:
        if value:
            output_console().print(f"{plain(name):<12} {plain(value)}", markup=False, soft_wrap=True)


def _print_table(features: list[ImportedFeature]) -> None:
    from rich.table import Table
    from rich.text import Text

    scores = list(dict.fromkeys(name for feature in features for name in feature.scores))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("feature", no_wrap=True)
    table.add_column("domains")
    for name in scores:
        table.add_column(Text(plain(name)), justify="right", no_wrap=True)
    table.add_column("explanation")
    for feature in features:
        cells = (f"{feature.scores[name]:.3f}" if name in feature.scores else "-" for name in scores)
        explanation = feature.explanations[0].text if feature.explanations else ""
        table.add_row(feature.id, ", ".join(feature.domains), *cells, Text(plain(explanation)))
    output_console().print(table)

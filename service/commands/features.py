"""`bank list` and `bank search`: features by what is recorded of them, and by their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import DataError
from service.commands.bank_reader import read_labelled
from service.commands.collections import collection_at, list_collection
from service.commands.options import BankArgument, JsonOption
from service.commands.terminal import output_console, plain, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from feature_bank.review import EffectiveLabel
    from feature_bank.schema import FeatureRecord
    from feature_bank.search import FeatureFilter, Hit

__all__ = ["DomainFilter", "LayerFilter", "feature_json", "list_features", "search_features"]


class SortKey(StrEnum):
    """By what a list of features is ordered."""

    BANK = "bank"
    AUROC = "auroc"
    DENSITY = "density"
    LAYER = "layer"


class ReviewStatus(StrEnum):
    """What reviewers say of a feature."""

    UNREVIEWED = "unreviewed"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


DomainFilter = Annotated[str | None, typer.Option("--domain", help="Only features tagged with this domain.")]
LayerFilter = Annotated[int | None, typer.Option("--layer", help="Only features of this layer.")]
ConceptFilter = Annotated[
    str | None,
    typer.Option("--concept", help="Only features tagged with this concept, such as politics/election_campaign."),
]
StatusFilter = Annotated[ReviewStatus | None, typer.Option("--status", help="Only features that reviewers left so.")]
AdmittedFilter = Annotated[
    bool, typer.Option("--admitted/--all", help="Only features that the preset's rules let into the guard, or all.")
]
MinScoreFilter = Annotated[
    list[str] | None,
    typer.Option(
        "--min-score",
        metavar="[NAME=]VALUE",
        help="Only features with at least this score: auroc (if no name is given), corr, corr_low, frequency, or one "
        "that `bank show` names. May be given several times.",
    ),
]
LimitOption = Annotated[int, typer.Option("--limit", min=0, help="How many to show; 0 shows all.")]


def list_features(
    path: BankArgument = None,
    domain: DomainFilter = None,
    concept: ConceptFilter = None,
    layer: LayerFilter = None,
    status: StatusFilter = None,
    min_score: MinScoreFilter = None,
    admitted: AdmittedFilter = False,
    sort: Annotated[SortKey, typer.Option("--sort", help="auroc and density put the largest first.")] = SortKey.AUROC,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """List a bank's features with their explanations. auroc: how well one feature alone finds its domain.

    Labels are those that reviews left. A collection that `bank import` made is listed as its publisher orders it.
    """
    from feature_bank.search import find_score

    bank_only = {"concept": concept, "status": status, "admitted": admitted, "sort": sort is not SortKey.AUROC}
    if _is_listed_collection(path, "", domain, layer, min_score, limit, as_json, bank_only):
        return
    bank, _, labels = read_labelled(path)
    chosen = _filter(domain, concept, layer, status, min_score, admitted).select(bank, labels)
    if sort is SortKey.AUROC:
        chosen.sort(key=lambda f: find_score(f, "auroc", labels[f.id].domains, domain) or 0.0, reverse=True)
    elif sort is SortKey.DENSITY:
        chosen.sort(key=lambda feature: feature.density, reverse=True)
    elif sort is SortKey.LAYER:
        chosen.sort(key=lambda feature: (feature.layer, feature.index))
    shown = chosen[:limit] if limit else chosen
    if as_json:
        print_json([feature_json(feature, labels[feature.id]) for feature in shown])
        return
    console = output_console()
    console.print(_features_table(shown, labels, domain))
    console.print(f"\n{len(shown)} of {len(chosen)} features", style="dim")


def search_features(
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="Words, and phrases in double quotes: 'vote \"prime minister\"'.")
    ],
    path: BankArgument = None,
    domain: DomainFilter = None,
    concept: ConceptFilter = None,
    layer: LayerFilter = None,
    status: StatusFilter = None,
    min_score: MinScoreFilter = None,
    admitted: AdmittedFilter = False,
    limit: LimitOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Find features by their texts: id, explanation, concepts, terms, promoted tokens, evidence.

    Every term of the query must occur, at the beginning of a word if there is such a word, else anywhere. Best matches
    come first. In a collection that `bank import` made, every word must occur somewhere in an explanation.
    """
    from feature_bank.search import SearchIndex

    bank_only = {"concept": concept, "status": status, "admitted": admitted}
    if _is_listed_collection(path, query, domain, layer, min_score, limit, as_json, bank_only):
        return
    bank, _, labels = read_labelled(path)
    wanted = _filter(domain, concept, layer, status, min_score, admitted).select(bank, labels)
    kept = {feature.id for feature in wanted}
    hits = [hit for hit in SearchIndex(bank, labels).search(query) if hit.feature.id in kept]
    shown = hits[:limit] if limit else hits
    if as_json:
        print_json(
            [
                feature_json(hit.feature, labels[hit.feature.id])
                | {"relevance": hit.relevance, "found_in": list(hit.fields)}
                for hit in shown
            ]
        )
        return
    console = output_console()
    if shown:
        console.print(_features_table([hit.feature for hit in shown], labels, domain, hits=shown))
        console.print()
    console.print(f"{len(shown)} of {len(hits)} features", style="dim")


def feature_json(feature: FeatureRecord, label: EffectiveLabel) -> dict[str, Any]:
    """A feature's record, with the label that reviews left as `effective`."""
    from dataclasses import asdict

    return feature.model_dump() | {"effective": asdict(label)}


def _is_listed_collection(
    path: Path | None,
    query: str,
    domain: str | None,
    layer: int | None,
    min_score: Sequence[str] | None,
    limit: int,
    as_json: bool,
    bank_only: Mapping[str, object],
) -> bool:
    """Whether the path holds a collection, which is then listed."""
    collection = collection_at(path, **bank_only)
    if collection is None:
        return False
    scores = _parse_scores(min_score)
    list_collection(collection, query, domain=domain, layer=layer, min_scores=scores, limit=limit, as_json=as_json)
    return True


def _filter(
    domain: str | None,
    concept: str | None,
    layer: int | None,
    status: ReviewStatus | None,
    min_score: Sequence[str] | None,
    admitted: bool,
) -> FeatureFilter:
    from feature_bank.search import FeatureFilter

    return FeatureFilter(
        domain=domain,
        concept=concept,
        layer=layer,
        status=None if status is None else status.value,
        admitted=True if admitted else None,
        min_scores=_parse_scores(min_score),
    )


def _parse_scores(texts: Sequence[str] | None) -> dict[str, float]:
    return dict(map(_parse_score, texts or ()))


def _parse_score(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        return name.strip() or "auroc", float(value)
    except ValueError:
        raise DataError(f"--min-score: {text!r} is not NAME=VALUE, such as auroc=0.8") from None


def _features_table(
    features: Sequence[FeatureRecord],
    labels: Mapping[str, EffectiveLabel],
    domain: str | None,
    hits: Sequence[Hit] | None = None,
) -> Table:
    """Columns that would be empty in every row are left out."""
    from rich.table import Table
    from rich.text import Text

    from feature_bank.search import find_score

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    columns: dict[str, list[str | Text]] = {
        "feature": [f.id for f in features],
        "domains": [", ".join(labels[f.id].domains) for f in features],
    }
    if any(labels[f.id].status != "unreviewed" for f in features):
        columns["review"] = [labels[f.id].status.replace("unreviewed", "") for f in features]
    if not all(f.admitted for f in features):
        columns["admitted"] = ["yes" if f.admitted else "no" for f in features]
    columns["auroc"] = [shown(find_score(f, "auroc", labels[f.id].domains, domain)) for f in features]
    if any(f.fidelity for f in features):
        columns["corr"] = [shown(find_score(f, "corr")) for f in features]
    columns["density"] = [f"{f.density:.4%}" for f in features]
    if hits is not None:
        columns["found in"] = [", ".join(hit.fields) for hit in hits]
    columns["explanation"] = [Text(plain(labels[f.id].explanation)) for f in features]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        is_figure = name in ("auroc", "corr", "density")
        table.add_column(name, justify="right" if is_figure else "left", no_wrap=is_figure)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table

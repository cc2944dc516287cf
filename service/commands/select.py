"""`train select`: which of many SAEs to build on, before any of their features is explained."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.options import JsonOption, ModelOption
from service.commands.sae_folders import (
    find_saes,
    note_other_models,
    read_sae,
    short_names,
    trained_as,
    training_record,
)
from service.commands.stages import StageReport
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from feature_bank.formats.source import LoadedSAE
    from training.contrast import ContrastTexts
    from training.ranking import Candidate, Ranked

__all__ = ["select"]


class PairSplit(StrEnum):
    """Which of the taxonomy's pairs are used."""

    ALL = "all"
    TRAIN = "train"
    TEST = "test"


def select(
    saes: Annotated[
        list[Path],
        typer.Argument(metavar="SAE_FOLDER...", help="SAELens folders, or folders of them, such as a sweep's --out."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the selection is written.")],
    taxonomy: Annotated[
        Path | None,
        typer.Option("--taxonomy", metavar="FOLDER", help="Folder of DOMAIN.yaml files. Default: the shipped ones."),
    ] = None,
    model: ModelOption = None,
    lang: Annotated[
        list[str] | None, typer.Option("--lang", help="Only pairs in this language; several times for several.")
    ] = None,
    split: Annotated[PairSplit, typer.Option("--split", help="Only these pairs of the taxonomy.")] = PairSplit.ALL,
    permutations: Annotated[
        int, typer.Option("--permutations", min=20, max=10_000, help="Repeats of the null, pairs turned round.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the null.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Rank SAEs, layer by sparsity, by how well their features tell the taxonomy's contrast pairs apart.

    Writes figures, a table, a plot and the choice to --out. The pairs' activations are kept there: run again with more
    SAEs at the same hook points, the model is not.
    """
    from feature_bank.identity import identify
    from feature_bank.taxonomy import load_taxonomy
    from guard.models import load_model
    from training.contrast import LANGUAGES, choose_pairs, harvest_contrasts, taxonomy_texts
    from training.ranking import check_candidates, choose, rank_candidates
    from training.selection import BEST
    from training.selection_report import ACTIVATIONS, check_selection_folder, write_selection

    check_selection_folder(out)
    concepts = load_taxonomy(taxonomy)
    languages = tuple(lang or LANGUAGES)
    splits = ("train", "test") if split is PairSplit.ALL else (split.value,)
    texts = choose_pairs(taxonomy_texts(concepts), languages=languages, splits=splits)
    folders = find_saes(saes)
    candidates: list[Candidate] = []
    model_names: dict[str, str | None] = {}
    for name, folder in zip(short_names(folders), folders, strict=True):
        source = read_sae(folder)  # dropped again: the weights of many SAEs may not fit
        candidates.append(_candidate(name, folder, source))
        model_names[name] = source.model_name

    loaded = load_model(model)
    hooks = check_candidates(candidates, loaded.model)
    note_other_models(model_names, loaded.model_id)
    identity = identify(loaded.model, loaded.tokenizer, loaded.model_id)
    with StageReport() as report:
        cache = harvest_contrasts(
            loaded.model,
            loaded.tokenizer,
            texts,
            hooks,
            out / ACTIVATIONS,
            fingerprint={"model": identity.config_hash, "tokenizer": identity.tokenizer_hash},
            report=report,
        )
        ranked = rank_candidates(
            candidates,
            cache,
            texts,
            report=report,
            permutations=permutations,
            seed=seed,
            device=loaded.model.device,
        )
    choice = choose(ranked)
    provenance = {
        "model": {"id": loaded.model_id, "config_hash": identity.config_hash},
        "taxonomy": _about(texts, languages, splits),
        "settings": {"permutations": permutations, "seed": seed, "best": BEST},
    }
    record = write_selection(out, ranked, choice, provenance)
    if as_json:
        print_json(record)
        return
    console = output_console()
    console.print(_table(ranked))
    console.print()
    for line in choice.why:
        console.print(plain(line), markup=False, soft_wrap=True)
    error_console().print(f"written: {out}", markup=False, soft_wrap=True)


def _candidate(name: str, folder: Path, source: LoadedSAE) -> Candidate:
    from training.ranking import Candidate

    with source.weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    figures = training_record(source).get("figures")
    return Candidate(
        name=name,
        hook_name=source.sae.hook_name,
        d_in=source.sae.d_in,
        d_sae=source.sae.d_sae,
        load=lambda: read_sae(folder).sae,
        about={
            "architecture": trained_as(source),
            "sha256": sha256,
            "training": figures if isinstance(figures, dict) else None,
        },
    )


def _about(texts: ContrastTexts, languages: Sequence[str], splits: Sequence[str]) -> dict[str, Any]:
    from training.corpus import corpus_hash

    return {
        "sha256": corpus_hash(texts.documents),
        "languages": list(languages),
        "splits": list(splits),
        "pairs": len(texts.pairs),
    }


def _table(ranked: Sequence[Ranked]) -> Table:
    """A line an SAE, best first: what is ranked by, and the plain figure beside its null."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("SAE", overflow="fold", min_width=16)
    for name in ("L0", "separation", "I_CDF", "its null"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in ranked:
        plain_figure = entry.mean("i_cdf", margin=False)
        error = "" if entry.error is None else f" ± {entry.error:.4f}"
        table.add_row(
            Text(plain(entry.name)),
            f"{entry.l0:.1f}",
            f"{entry.separation:.4f}{error}",
            f"{plain_figure:.5f}",
            f"{plain_figure - entry.mean('i_cdf'):.5f}",
        )
    return table

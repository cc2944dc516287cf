"""`bank import` and `bank export`: feature collections of others, in and out, with what is lost on the way."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feature_bank.errors import BankError, DataError, SailguardError
from service.commands.interop_summaries import (
    bank_counts,
    check_target,
    print_counts,
    print_losses,
    write_collection,
)
from service.commands.options import JsonOption
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.formats import LoadedSAE
    from feature_bank.interop.collection import Collection
    from training.imports import Joined

__all__ = ["add_commands"]

LINE_SECONDS = 10.0

OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="What to write.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a folder of the same kind that --out holds.")
]


def add_commands(app: typer.Typer) -> None:
    """The groups `import` and `export` under `bank`."""
    importing = typer.Typer(help="Import features that others published.", no_args_is_help=True)
    importing.command("safe-sail")(import_safe_sail)
    importing.command("neuronpedia")(import_neuronpedia)
    exporting = typer.Typer(help="Export a bank in others' layouts.", no_args_is_help=True)
    exporting.command("neuronpedia")(export_bank)
    app.add_typer(importing, name="import")
    app.add_typer(exporting, name="export")


def import_safe_sail(
    database: Annotated[Path, typer.Argument(metavar="DB", help="Safe-SAIL's feature database, JSON, gzipped or not.")],
    out: OutOption,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE|FOLDER",
            help="ckpt_layerN.pt, a folder of such files, or a SAELens folder made of one; several times for several. "
            "Without it a collection is written, with it a bank.",
        ),
    ] = None,
    index: Annotated[int | None, typer.Option("--index", help="Which SAE of a file that stacks several.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Features per token of a TopK SAE. Default: 200.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FOLDER|HUB-ID", help="The SAEs' model. Default: Qwen/Qwen2.5-3B-Instruct."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text to measure and calibrate on, JSON lines, gzipped or not; several times for several files. "
            "Default: the text written for the project.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="Pooling, canary and tokens of a text are this one's.")
    ] = "smollm2-135m",
    min_score: Annotated[
        float, typer.Option("--min-score", help="Features below this correlation score are in no head.")
    ] = 0.2,
    untagged: Annotated[
        bool, typer.Option("--untagged", help="Take features without a tag into the bank too.")
    ] = False,
    name: Annotated[str | None, typer.Option("--name", help="The bank's name. Default: safe-sail-MODEL.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", metavar="FOLDER", help="Activations, from which a second run resumes. Default: OUT.work"
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import Safe-SAIL's published features: as a collection, or with a checkpoint as a bank that the guard loads."""
    from feature_bank.interop.safe_sail_db import read_safe_sail

    if not checkpoint:
        given = {"--model": model, "--data": data, "--index": index, "--k": k, "--name": name, "--work": work}
        for option, value in given.items():
            if value is not None:
                raise BankError("is for a bank, which needs a --checkpoint", field=option)
        check_target(out, "collection.json", "collection", overwrite)
        write_collection(read_safe_sail(database), out, as_json)
        return
    check_target(out, "bank.json", "bank", overwrite)
    for path in data or []:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --data")
    collection = read_safe_sail(database)
    joined = _join(
        collection,
        _read_saes(checkpoint, index, k),
        model=model,
        data=data,
        preset=preset,
        min_score=min_score,
        untagged=untagged,
        name=name,
        out=out,
        work=work or out.with_name(f"{out.name}.work"),
    )
    summary = {
        "kind": "bank",
        "out": str(out),
        "collection": collection.counts(),
        **bank_counts(joined.bank),
        "left_out": dict(joined.left_out),
        "notes": list(joined.notes),
        "losses": [loss.model_dump() for loss in collection.losses],
    }
    if as_json:
        print_json(summary)
        return
    console = output_console()
    console.print(f"{plain(joined.bank.version)}: {len(joined.bank.features)} features", markup=False, soft_wrap=True)
    print_counts(summary["by_domain_and_layer"])
    for reason, count in joined.left_out.items():
        console.print(f"left out: {count:,} features ({reason})", markup=False, soft_wrap=True)
    for note in joined.notes:
        console.print(plain(note), markup=False, soft_wrap=True)
    print_losses(collection.losses)


def import_neuronpedia(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="An export of Neuronpedia (a source, a model, or all), or SAEDashboard's batch files.",
        ),
    ],
    out: OutOption,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import features in Neuronpedia's layout as a collection."""
    from feature_bank.interop.neuronpedia_import import read_neuronpedia

    check_target(out, "collection.json", "collection", overwrite)
    write_collection(read_neuronpedia(folder), out, as_json)


def export_bank(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="Bank folder.")],
    out: OutOption,
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="The model's id there. Default: the bank's name for it, as an id.")
    ] = None,
    set_name: Annotated[
        str, typer.Option("--set-name", help="What the names of the source sets begin with.")
    ] = "sailguard",
    creator_id: Annotated[
        str, typer.Option("--creator-id", help="The user there that the rows belong to.")
    ] = "sailguard",
    as_json: JsonOption = False,
) -> None:
    """Export a bank's features in Neuronpedia's layout. OUT must be new."""
    from feature_bank.bank import REVIEWS, Bank
    from feature_bank.interop.neuronpedia_export import export_neuronpedia

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SailguardError(f"{out}: --out exists; name a new folder")
    loaded = Bank.load(bank)
    reviews = bank / REVIEWS
    exported = export_neuronpedia(
        loaded,
        out,
        model_id=model_id,
        set_name=set_name,
        creator_id=creator_id,
        reviews=sum(bool(line.strip()) for line in reviews.read_bytes().splitlines()) if reviews.is_file() else 0,
    )
    if as_json:
        print_json(
            {
                "out": str(out),
                "bank": loaded.version,
                "model_id": exported.model_id,
                "sources": list(exported.sources),
                "explanations": exported.explanations,
                "activations": exported.activations,
                **bank_counts(loaded),
                "losses": [loss.model_dump() for loss in exported.losses],
            }
        )
        return
    console = output_console()
    for source in exported.sources:
        console.print(f"{exported.model_id}/{source}", markup=False, soft_wrap=True)
    console.print(
        f"{exported.features:,} features, {exported.explanations:,} explanations, {exported.activations:,} texts",
        markup=False,
    )
    print_losses(exported.losses)


def _join(
    collection: Collection,
    saes: list[LoadedSAE],
    *,
    model: str | None,
    data: list[Path] | None,
    preset: str,
    min_score: float,
    untagged: bool,
    name: str | None,
    out: Path,
    work: Path,
) -> Joined:
    from feature_bank.identity import identify
    from feature_bank.interop.neuronpedia import slug
    from feature_bank.interop.safe_sail_db import SCORE
    from guard.models import load_model
    from training.corpus import read_documents
    from training.imports import join_collection, joinable
    from training.pipeline import load_preset, own_corpora

    joinable(collection, saes, untagged=untagged)  # what cannot be is said before a model is loaded
    settings = load_preset(preset)
    documents, corpora = read_documents(data or own_corpora())
    loaded = load_model(model or collection.model)
    progress, said = error_console(), 0.0

    def report(stage: str, done: int, total: int, detail: str) -> None:
        nonlocal said
        now = time.monotonic()
        if done == total or now - said >= LINE_SECONDS:
            progress.print(f"{stage} {done}/{total}: {plain(detail)}", markup=False, soft_wrap=True)
            said = now

    return join_collection(
        collection,
        saes,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        identity=identify(loaded.model, loaded.tokenizer, loaded.model_id),
        preset=settings,
        documents=documents,
        corpora=corpora,
        name=name or f"safe-sail-{slug(loaded.model_id)}",
        out=out,
        work=work,
        score=SCORE,
        min_score=min_score,
        untagged=untagged,
        report=report,
    )


def _read_saes(paths: Iterable[Path], index: int | None, k: int | None) -> list[LoadedSAE]:
    """The SAEs of files and folders; a folder may hold one file a layer."""
    from feature_bank.formats import SourceOptions, read_source
    from feature_bank.formats.safe_sail import FORMAT

    found = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.is_file() and FORMAT.matches(p)) if path.is_dir() else []
        for file in inside or [path]:
            found.append(read_source(file, SourceOptions(index=index, k=k)))
    return found

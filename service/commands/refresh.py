"""`train refresh`: the next version of a bank from what people marked in its traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feature_bank.errors import DataError
from service.commands.cluster import ClusterOption, stages_on
from service.commands.options import ModelOption
from service.commands.stages import StageReport
from service.commands.terminal import error_console, output_console
from service.commands.train_inputs import data_files, existing

if TYPE_CHECKING:
    from training.refresh import Refreshed

__all__ = ["refresh"]

DIFF = "difference.txt"


def refresh(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="The bank, or a folder of versions: the current one.")],
    spool: Annotated[Path, typer.Option("--spool", metavar="FILE", help="The spool with marked items.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the candidate and what was found of it are written.")
    ],
    store: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="The folder of versions that --promote puts it into.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Further text that holds the heads to what they are."),
    ] = None,
    dev: Annotated[
        list[Path] | None, typer.Option("--dev", metavar="FILE", help="Labelled text that is only measured on.")
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            "--margin",
            min=0.0,
            max=1.0,
            help="How far AUROC or true-positive rate may fall, or false-positive rate rise.",
        ),
    ] = 0.02,
    rate: Annotated[
        str,
        typer.Option(
            "--rate", metavar="RATE", help="The false-positive rate at which the policy's rules stand, as in the bank."
        ),
    ] = "0.01",
    promote: Annotated[bool, typer.Option("--promote", help="Make it the current version if nothing fell.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train new SAEs on --data and on the texts that the spool was let keep.")
    ] = False,
    preset: Annotated[
        str, typer.Option("--preset", help="With --retrain: named settings, or a preset file.")
    ] = "smollm2-135m",
    cluster: ClusterOption = None,
    model: ModelOption = None,
) -> None:
    """Fit a bank's heads again on marked traffic, held to what they are, and compare the two versions.

    The features stay, unless SAEs are retrained; rejected ones weigh nothing. Exit code 1 if the candidate is worse
    than the bank on text that was never fitted on, or marked texts are not mended: it lies in OUT then, and is not
    promoted.
    """
    files, measured = data_files(data or []) if retrain else existing(data or []), existing(dev or [])
    if promote and store is None:
        raise DataError("--promote puts the candidate into a folder of versions; name it with --store")
    if promote and not files and not measured:
        raise DataError(
            "--promote wants the versions compared on more than the project's own texts, which are of few kinds: name "
            "labelled text with --dev, or the text that the bank was trained on with --data"
        )

    if cluster and not retrain:
        raise DataError("--cluster is for --retrain: fitting heads alone is done here")
    if store is not None:
        _check_store(store, bank, promote=promote)

    from guard.models import load_model
    from training.pipeline import load_preset
    from training.refresh import refresh_bank
    from training.refresh_retrain import Retraining

    settings = load_preset(preset) if retrain else None
    with stages_on(cluster) as stages, StageReport() as report:
        loaded = load_model(model)
        retraining = None
        if settings is not None:
            retraining = Retraining(
                model=loaded.model, tokenizer=loaded.tokenizer, preset=settings, data=files, stages=stages
            )
        found = refresh_bank(
            bank,
            spool=spool,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            out=out,
            report=report,
            data=files,
            dev=measured,
            store=store,
            margin=margin,
            rate=rate,
            retrain=retraining,
            beyond_own=promote,
        )
    _write_difference(found, out / DIFF)
    console = output_console()
    console.print(f"{found.bank.version} in {found.folder}", markup=False, soft_wrap=True)
    _print_marks(found)
    if found.problems:
        error_console().print("not promoted; the bank is kept as a candidate:", markup=False, soft_wrap=True)
        for problem in found.problems:
            error_console().print(f"  {problem}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    if promote:
        from feature_bank.versions import VersionStore

        assert store is not None
        switch = VersionStore(store).promote(found.folder, replaces=found.before.version)
        console.print(f"{switch.version} is the current version of {store}", markup=False, soft_wrap=True)
    else:
        line = f"nothing fell; promote it with: sailguard bank promote {found.folder} --store {store or 'DIR'}"
        console.print(line, markup=False, soft_wrap=True)


def _check_store(store: Path, bank: Path, *, promote: bool) -> None:
    """Refuse a folder without versions and, to promote, one in which another version than the bank is current."""
    from feature_bank.bank import Bank, bank_folder
    from feature_bank.versions import VersionStore

    if not (store / "versions").is_dir():
        if not promote:
            raise DataError(f"--store {store}: there are no versions of a bank in it")
        return
    current, mine = VersionStore(store).current, Bank.load(bank_folder(bank)).version
    if promote and current not in (None, mine):
        raise DataError(
            f"--store {store}: {current} is current there, and the candidate is compared with {mine}; refresh "
            f"{store} itself, or leave out --promote"
        )


def _print_marks(found: Refreshed) -> None:
    console = output_console()
    for domain, measured in found.report["fresh"].items():
        if otherwise := measured["served_otherwise"]:
            line = f"{domain}: {otherwise} marked items were decided otherwise when they were served than at the rate "
            line += f"{found.report['rate']}; if the policy's rules stand at another one, name it with --rate"
            error_console().print(line, markup=False, soft_wrap=True)
        for name, sides in measured["marks"].items():
            for side, counts in sides.items():
                if counts["marked"]:
                    what = f"{domain}, marked {name.replace('_', ' ')}, {side.replace('_', ' ')}"
                    right = f"right {counts['right_before']} -> {counts['right_after']} of {counts['marked']}"
                    console.print(f"{what}: {right}", markup=False, soft_wrap=True)


def _write_difference(found: Refreshed, path: Path) -> None:
    from feature_bank.atomic import atomic_file
    from feature_bank.difference import compare_banks
    from service.commands.difference import write_difference

    with atomic_file(path) as tmp, tmp.open("w", encoding="utf-8") as file:
        write_difference(compare_banks(found.before, found.bank), file)

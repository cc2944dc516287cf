"""`train refit`: a bank's reviews carried out, as its next version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.options import ModelOption
from service.commands.stages import StageReport
from service.commands.terminal import output_console
from service.commands.train_inputs import check_target, data_files

__all__ = ["refit"]


def refit(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="The bank that was reviewed.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the next version is written.")],
    work: Annotated[
        Path, typer.Option("--work", metavar="FOLDER", help="The work folder of the run that made the bank.")
    ],
    preset: Annotated[str, typer.Option("--preset", help="The settings that it was made with.")] = "smollm2-135m",
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE", help="The text that it was made from.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bank that OUT holds.")] = False,
    model: ModelOption = None,
) -> None:
    """Refit and recalibrate a bank's heads without the features that reviewers rejected.

    Labels are those of the reviews, which go with the new version. Nothing is harvested or trained again.
    """
    check_target(out, overwrite)
    paths = data_files(data or [])

    from feature_bank.identity import identify
    from guard.models import load_model
    from training.pipeline import load_preset
    from training.refit import refit_bank

    settings = load_preset(preset)
    loaded = load_model(model)
    with StageReport() as report:
        refitted = refit_bank(
            bank,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            identity=identify(loaded.model, loaded.tokenizer, loaded.model_id),
            preset=settings,
            data=paths,
            work=work,
            out=out,
            report=report,
        )
    output_console().print(
        f"{refitted.version}: {len(refitted.features)} features in {out}; compare with `sailguard bank diff`",
        markup=False,
        soft_wrap=True,
    )

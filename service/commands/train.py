"""`train`: a feature bank of one's own; `train saes`, `harvest`, `select`: its parts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from feature_bank.errors import DataError
from service.commands.cluster import ClusterOption, stages_on
from service.commands.explain import explain
from service.commands.harvest import harvest
from service.commands.options import JsonOption, ModelOption
from service.commands.refit import refit
from service.commands.refresh import refresh
from service.commands.select import select
from service.commands.stages import StageReport
from service.commands.terminal import output_console, plain, print_json
from service.commands.train_inputs import DATA_FILES, DATA_FOLDER, check_target, data_files, existing

if TYPE_CHECKING:
    from rich.table import Table

    from training.trainer import TrainedSae

__all__ = ["build_app"]

BANK = "bank"

MoreArgument = Annotated[
    list[Path] | None, typer.Argument(metavar="[FILE]...", help="More files, as if each followed --data.")
]


class TrainGroup(TyperGroup):
    """A group of which `bank` is meant if no command is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the command that the user left out."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [BANK, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The commands, and then what `train` takes without one."""
        super().format_help(ctx, formatter)
        bank = self.commands[BANK]
        bank.format_help(type(ctx)(bank, info_name=f"[{BANK}]", parent=ctx), formatter)


def build_app() -> typer.Typer:
    """The group `train`."""
    app = typer.Typer(cls=TrainGroup, help="Train a feature bank, or its parts alone. Without a command: a bank.")
    app.command(BANK)(train_bank)
    app.command()(saes)
    app.command()(refit)
    app.command()(refresh)
    app.command()(harvest)
    app.command()(select)
    app.command()(explain)
    return app


def train_bank(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The bank to write.")],
    preset: Annotated[str, typer.Option("--preset", help="Named settings, or a preset file.")] = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="JSON lines, gzipped or not; several times for several files. "
            f"Default: {' and '.join(DATA_FILES)} in the folder that {DATA_FOLDER} names.",
        ),
    ] = None,
    more: MoreArgument = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="FOLDER",
            help="Intermediate results, from which a second run resumes. Default: OUT.work",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bank that OUT holds.")] = False,
    model: ModelOption = None,
    cluster: ClusterOption = None,
) -> None:
    """Train SAEs on a model's activations and distil them into a feature bank."""
    check_target(out, overwrite)
    paths = data_files([*(data or []), *(more or [])])

    from feature_bank.identity import identify
    from guard.models import load_model
    from training import pipeline

    settings = pipeline.load_preset(preset)
    with stages_on(cluster) as stages:
        loaded = load_model(model)
        with StageReport() as report:
            bank = pipeline.train_bank(
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                identity=identify(loaded.model, loaded.tokenizer, loaded.model_id),
                preset=settings,
                data=paths,
                out=out,
                work=work or out.with_name(f"{out.name}.work"),
                report=report,
                stages=stages,
            )
    output_console().print(f"{bank.version}: {len(bank.features)} features in {out}", markup=False, soft_wrap=True)


def saes(
    config: Annotated[str, typer.Option("--config", metavar="FILE", help="A sweep's YAML file, or a shipped name.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the SAEs and their table are written.")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="JSON lines, gzipped or not; several times for several files."),
    ] = None,
    more: MoreArgument = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FOLDER", help="Activations that were harvested before, instead of --data."),
    ] = None,
    model: ModelOption = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train many SAEs at once: layers, sparsities, seeds and architectures, from one pass over the activations.

    Run again after an interruption, it goes on where it stopped; SAEs that are finished stay as they are.
    """
    paths = existing([*(data or []), *(more or [])])
    if bool(paths) == (cache is not None):
        raise DataError("name the files of text with --data, or the folder of harvested activations with --cache")

    from training.sweep import load_sweep, rows, train_cached, train_sweep

    sweep = load_sweep(config)
    with stages_on(cluster) as stages, StageReport() as report:
        if cache is not None:
            from training.cache import open_harvest

            trained = train_cached(
                sweep, open_harvest(cache.resolve() if cluster else cache), out, report=report, stages=stages
            )
        else:
            from feature_bank.identity import identify
            from guard.models import load_model

            loaded = load_model(model)
            trained = train_sweep(
                sweep,
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                identity=identify(loaded.model, loaded.tokenizer, loaded.model_id),
                data=paths,
                out=out,
                report=report,
                stages=stages,
            )
    if as_json:
        print_json(rows(trained))
    else:
        output_console().print(_table(trained))


def _table(trained: list[TrainedSae]) -> Table:
    """One line an SAE; beside the options stands whatever else is not the same for all."""
    from dataclasses import fields

    from rich.table import Table

    columns = {"architecture", "options", "seed"}
    names = [field.name for field in fields(trained[0].run.config) if field.name not in columns]
    varying = [name for name in names if len({repr(getattr(sae.run.config, name)) for sae in trained}) > 1]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("hook point", "architecture", "options"):
        table.add_column(name, overflow="fold")
    for name in ("seed", "fvu", "l0", "dead", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for sae in trained:
        run, figures = sae.run, sae.figures
        target = f" to {run.hook_name_out}" if run.hook_name_out else ""
        options = {**run.config.options, **{name: getattr(run.config, name) for name in varying}}
        table.add_row(
            plain(run.hook_name + target),
            run.config.architecture,
            plain(", ".join(f"{name} {value}" for name, value in options.items())),
            str(run.config.seed),
            f"{figures['fvu']:.4f}",
            f"{figures['l0']:.1f}",
            f"{figures['dead_fraction']:.2%}",
            f"{figures['tokens_per_second']:,.0f}",
        )
    return table

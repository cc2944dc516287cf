"""`sae quality`: what SAEs are worth, on activations and inside their model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import DataError
from service.commands.harvest import TextFormat
from service.commands.options import DataOption, JsonOption, ModelOption
from service.commands.sae_folders import note_other_models, read_sae, short_names, trained_as
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from rich.table import Table


__all__ = ["quality"]

_COLUMNS = (
    "l0",
    "fvu",
    "explained_variance",
    "cossim",
    "l2_ratio",
    "relative_reconstruction_bias",
    "dead_fraction",
    "ce_loss_recovered",
    "kl_div_score",
    "kl_div_with_sae",
)
_FEW = 3  # SAEs that are shown side by side, a figure a line; more of them are shown a line each
_BY_LINE = ("l0", "fvu", "ce_loss_recovered", "kl_div_with_sae", "dead_fraction")


class AblationKind(StrEnum):
    """What the cross-entropy is compared with."""

    ZERO = "zero"
    MEAN = "mean"


class SplicePositions(StrEnum):
    """Where the reconstruction takes the activation's place."""

    CONTENT = "content"
    ALL = "all"


def quality(
    saes: Annotated[list[Path], typer.Argument(metavar="SAE_FOLDER...", help="SAELens folders of SAEs of one model.")],
    data: DataOption,
    model: ModelOption = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FOLDER", help="Write a report with plots to this folder.")
    ] = None,
    text_format: Annotated[
        TextFormat, typer.Option("--format", help="As a user's message in the chat template, or as it stands.")
    ] = TextFormat.PLAIN,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=2, help="Of each text; the rest is cut off.")] = 128,
    total_tokens: Annotated[int, typer.Option("--total-tokens", min=1, help="Stop reading text at so many.")] = 20_000,
    ablation: Annotated[
        AblationKind, typer.Option("--ablation", help="What loss recovered is measured against.")
    ] = AblationKind.ZERO,
    splice_at: Annotated[
        SplicePositions, typer.Option("--splice-at", help="The text's own tokens, or all positions but padding.")
    ] = SplicePositions.CONTENT,
    as_json: JsonOption = False,
) -> None:
    """Measure SAEs on text that they were not trained on.

    Reconstruction, sparsity and feature density, and what the model loses when the reconstruction takes the place of
    its activations; names and definitions are those of SAEBench's core evaluation.
    """
    for path in data:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --data")

    from guard.models import load_model
    from training.downstream import measure_quality
    from training.report import ReportEntry, check_report_folder, write_report
    from training.texts import read_texts

    if report is not None:
        check_report_folder(report)  # before minutes of work
    sources = {name: read_sae(path) for name, path in zip(short_names(saes), saes, strict=True)}
    loaded = load_model(model)
    tokenizer: Any = loaded.tokenizer
    sequences, counts = read_texts(
        data,
        tokenizer,
        text_format=text_format.value,
        max_tokens=max_tokens,
        total_tokens=total_tokens,
    )
    note_other_models({name: source.model_name for name, source in sources.items()}, loaded.model_id)
    with _progress() as on_batch:
        found = measure_quality(
            loaded.model,
            sequences,
            {name: source.sae for name, source in sources.items()},
            ablation=ablation.value,
            splice_at=splice_at.value,
            on_batch=on_batch,
        )
    provenance = {
        "model": loaded.model_id,
        "text": f"{counts.rows:,} rows of {', '.join(map(_file, data))}, at most {max_tokens} tokens each"
        f"{' in the chat template' if text_format is TextFormat.CHAT else ''}",
    }
    entries = [ReportEntry(quality=figures, series=trained_as(sources[name])) for name, figures in found.items()]
    if report is not None:
        page = write_report(report, entries, title="Quality of sparse autoencoders", provenance=provenance)
        error_console().print(f"report: {page}", markup=False, soft_wrap=True)
    if as_json:
        print_json({**provenance, "saes": [{**e.quality.to_dict(), "series": e.series} for e in entries]})
        return
    _print([entry.quality.to_dict() for entry in entries])


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.name} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print(found: Sequence[dict[str, Any]]) -> None:
    console = output_console()
    console.print(_side_by_side(found) if len(found) <= _FEW else _one_a_line(found))
    first = found[0]
    console.print(
        f"\n{first['tokens']:,} tokens; cross-entropy {first['ce_loss_without_sae']:.4f} nats a token without an SAE. "
        f"Recovered: 1 is nothing lost, 0 what {first['ablation']} ablation leaves.",
        soft_wrap=True,
    )


def _side_by_side(found: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for row in found:
        table.add_column(Text(plain(row["name"])), justify="right", overflow="fold")
    for column in _COLUMNS:
        table.add_row(column, *(_figure(row[column]) for row in found))
    return table


def _one_a_line(found: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("SAE", overflow="fold")
    for column in _BY_LINE:
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        table.add_row(Text(plain(row["name"])), *(_figure(row[column]) for column in _BY_LINE))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"

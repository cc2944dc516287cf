"""`export-onnx`: the folder that the ONNX engine runs from, made of a bank and its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.options import ModelOption
from service.commands.terminal import error_console, output_console

if TYPE_CHECKING:
    from guard.engines.onnx_sidecar import Precision

__all__ = ["export_onnx"]

SHIPPED = "shipped"


def export_onnx(
    bank: Annotated[str, typer.Argument(metavar="BANK", help=f"Bank folder, or '{SHIPPED}' for the shipped one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; an earlier export is replaced.")],
    model: ModelOption = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write the int8 graph. Default: both.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Write the float32 graph. Default: both.")] = False,
) -> None:
    """Export a bank and its model for the engine that runs without torch: sailguard serve --engine onnx --model OUT

    The graph holds the model up to the last hooked layer, the bank's rows and its heads. It is run and compared with
    the model before OUT takes its place. Needs the extra onnx-export, and about 3 GB of memory for the embedded model.
    """
    from feature_bank.bank import shipped_bank_path
    from guard.engines.onnx_export import export_onnx as export
    from guard.models import load_model

    asked: dict[Precision, bool] = {"fp32": fp32, "int8": int8}
    wanted = [name for name, given in asked.items() if given] or list(asked)
    with error_console().status("Exporting; this takes a minute or two"):
        loaded = load_model(model, dtype="float32", device="cpu")
        path = shipped_bank_path() if bank == SHIPPED else Path(bank)
        exported = export(path, out, loaded.model, loaded.tokenizer, precisions=wanted)
    console = output_console()
    console.print(f"wrote {exported.folder}: {exported.sidecar.model.id}", markup=False, soft_wrap=True)
    for name, graph in exported.sidecar.graphs.items():
        size = (exported.folder / graph.file).stat().st_size / 1e6
        line = f"{name:<5} {size:,.0f} MB, scores at most {graph.score_error:.2g} off those of the model"
        console.print(line, markup=False, soft_wrap=True)

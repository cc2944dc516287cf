"""The group `sae`: other projects' SAEs into the native folder, what such a folder holds, and what it is worth.

Torch and numpy archives are opened by `convert` alone, when somebody asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import BankError
from service.commands.options import JsonOption
from service.commands.quality import quality
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.formats import LoadedSAE
    from feature_bank.sae import SAE

__all__ = ["build_app"]

# What a SAELens folder may hold. A folder with anything else in it is not replaced, whatever is asked.
_OWN_FILES = frozenset({"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"})


def build_app() -> typer.Typer:
    """The group `sae`."""
    app = typer.Typer(help="Convert sparse autoencoders, look into them, and measure them.", no_args_is_help=True)
    app.command()(convert)
    app.command()(info)
    app.command()(quality)
    return app


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="File or folder of the SAE.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The SAELens folder to write.")],
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(
            "--format",
            help="saelens, sparsify, dictionary_learning, gemma_scope, qwen_scope, llama_scope or safe_sail. "
            "Default: told from the file names.",
        ),
    ] = None,
    hook_name: Annotated[
        str | None, typer.Option("--hook-name", help="The hook point that it reads, such as blocks.12.hook_resid_post.")
    ] = None,
    hook_name_out: Annotated[
        str | None, typer.Option("--hook-name-out", help="The hook point that a transcoder predicts.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="The language model it was trained on.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Features per token, where the file does not say.")] = None,
    index: Annotated[int | None, typer.Option("--index", help="Which SAE of a file that stacks several.")] = None,
    norm_factor: Annotated[
        float | None,
        typer.Option("--norm-factor", help="What activations were multiplied by in training, where it is not stored."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a SAELens folder that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert an SAE of another project into a SAELens folder. Only tensors are read; code in a file is refused."""
    from feature_bank.formats import SourceOptions, read_source
    from feature_bank.formats.saelens import save_saelens

    _check_target(out, overwrite)
    options = SourceOptions(
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        model_name=model_name,
        k=k,
        index=index,
        norm_factor=norm_factor,
    )
    loaded = read_source(source, options, format=format)
    save_saelens(
        loaded.sae,
        out,
        model_name=loaded.model_name or "unknown",
        metadata={"sailguard": _provenance(loaded)},
    )
    if as_json:
        print_json({"out": str(out), **_describe(loaded)})
        return
    _print(loaded)
    error_console().print(f"written to {plain(str(out))}", markup=False, soft_wrap=True, style="dim")


def info(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A SAELens folder.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a SAELens folder holds. SAEs of other formats are to be converted first."""
    from feature_bank.formats import detect, read_source

    form = detect(folder)
    if form != "saelens":
        raise BankError(
            f"is in the format {form}; `sailguard sae convert` makes a SAELens folder of it", file=str(folder)
        )
    loaded = read_source(folder, format=form)
    if as_json:
        print_json(_describe(loaded))
    else:
        _print(loaded)


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a SAELens folder, and that too unless it was asked for."""
    if not out.exists() and not out.is_symlink():
        return
    is_folder = out.is_dir() and not out.is_symlink()
    foreign = sorted(path.name for path in out.iterdir() if path.name not in _OWN_FILES) if is_folder else []
    if not is_folder or foreign:
        what = f"it holds {foreign[0]!r}" if foreign else "it is no folder"
        raise BankError(f"exists, and is not replaced because {what}; name a new folder", file=str(out))
    if not overwrite:
        raise BankError("exists; --overwrite replaces it", file=str(out))


def _provenance(loaded: LoadedSAE) -> dict[str, Any]:
    import hashlib
    from importlib import metadata

    with loaded.weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "version": metadata.version("sailguard"),
        "source_format": loaded.format,
        "source_file": loaded.weights.name,
        "source_sha256": digest,
        "notes": list(loaded.notes),
    }


def _activation(sae: SAE) -> str:
    if sae.k is not None:
        return f"TopK, {sae.k} per token"
    return "JumpReLU" if bool((sae.threshold > 0).any()) else "ReLU"


def _describe(loaded: LoadedSAE) -> dict[str, Any]:
    from feature_bank.formats.saelens_config import architecture_of

    sae = loaded.sae
    norms = sae.W_dec.float().norm(dim=1)
    threshold = sae.threshold.float()
    return {
        "format": loaded.format,
        "architecture": architecture_of(sae),
        "model_name": loaded.model_name,
        "hook_name": sae.hook_name,
        "hook_name_out": sae.hook_name_out,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "k": sae.k,
        "threshold_min": float(threshold.min()),
        "threshold_max": float(threshold.max()),
        "decoder_norm_min": float(norms.min()),
        "decoder_norm_max": float(norms.max()),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "encoder_only": sae.encoder_only,
        "notes": list(loaded.notes),
    }


def _print(loaded: LoadedSAE) -> None:
    sae, facts = loaded.sae, _describe(loaded)
    lines = {
        "hook point": sae.hook_name if sae.hook_name_out is None else f"{sae.hook_name} -> {sae.hook_name_out}",
        "model": loaded.model_name or "unknown",
        "size": f"{sae.d_sae} features, width {sae.d_in}" + ("" if sae.d_out == sae.d_in else f" -> {sae.d_out}"),
        "activation": _activation(sae),
        "thresholds": f"{facts['threshold_min']:.4g} to {facts['threshold_max']:.4g}",
        "decoder": "none was published; rows are stand-ins, and it neither reconstructs nor steers"
        if sae.encoder_only
        else f"rows of length {facts['decoder_norm_min']:.4g} to {facts['decoder_norm_max']:.4g}",
        "dtype": facts["dtype"],
        "kept as": facts["architecture"],
    }
    console = output_console()
    for name, value in lines.items():
        console.print(f"{name:<11} {plain(value)}", markup=False, soft_wrap=True)
    for note in loaded.notes:
        console.print(f"{'note':<11} {plain(note)}", markup=False, soft_wrap=True)

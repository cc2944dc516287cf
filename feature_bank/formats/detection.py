"""Which format a file or folder is in, and reading it whatever it is."""

from __future__ import annotations

from pathlib import Path

from feature_bank.errors import BankError
from feature_bank.formats import (
    dictionary_learning,
    gemma_scope,
    llama_scope,
    qwen_scope,
    saelens,
    safe_sail,
    sparsify,
)
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMATS", "detect", "load_sae", "read_source"]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (saelens, sparsify, dictionary_learning, gemma_scope, qwen_scope, llama_scope, safe_sail)
}
"""All formats by name. A path is in the first that recognises it."""


def detect(path: Path) -> str:
    """The name of the format of a file or folder, from file names alone.

    Raises BankError if there is nothing, or if it is named as no known format names its files.
    """
    if not path.exists():
        raise BankError("does not exist", file=str(path))
    for name, form in FORMATS.items():
        if form.matches(path):
            return name
    raise BankError(
        f"is in no format that can be told from its file names; name it: {', '.join(FORMATS)}",
        file=str(path),
        field="format",
    )


def read_source(path: Path, options: SourceOptions | None = None, *, format: str | None = None) -> LoadedSAE:  # noqa: A002
    """Read an SAE in any known format, with what its files say of it.

    format: a key of `FORMATS`; without it the file names decide.
    Raises BankError naming the file and field for anything missing, malformed or unsupported.
    """
    if format is not None and format not in FORMATS:
        raise BankError(f"{format!r} is not known; known are {', '.join(FORMATS)}", field="format")
    if not path.exists():
        raise BankError("does not exist", file=str(path))
    options = options or SourceOptions()
    return FORMATS[format or detect(path)].load(path, options)


def load_sae(
    path: Path,
    *,
    format: str | None = None,  # noqa: A002
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    k: int | None = None,
    index: int | None = None,
    norm_factor: float | None = None,
) -> SAE:
    """The SAE alone; `read_source` tells where it came from too, and `SourceOptions` what the options mean.

    Raises BankError as `read_source` does.
    """
    options = SourceOptions(hook_name=hook_name, hook_name_out=hook_name_out, k=k, index=index, norm_factor=norm_factor)
    return read_source(path, options, format=format).sae

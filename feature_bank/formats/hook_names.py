"""From the module paths in other projects' files to public hook ids (TransformerLens names)."""

from __future__ import annotations

import re
from pathlib import Path

from feature_bank.errors import BankError
from feature_bank.formats.source import SourceOptions

__all__ = ["choose_hook", "hook_input", "hook_output", "layer_in"]

# `model.layers.5`, `layers.5`, `transformer.h.5`, `gpt_neox.layers.5`, each with or without a module of the block
_MODULE = re.compile(r"(?:^|\.)(?:layers|h|blocks)[._](?P<layer>\d+)(?:\.(?P<rest>.+))?$")
_MLP = ("mlp", "mlp.down_proj")


def hook_output(module: str) -> str | None:
    """The hook id of a module's output; None if there is none for it."""
    match = _MODULE.search(module)
    if match is None:
        return None
    if match["rest"] is None:
        return f"blocks.{match['layer']}.hook_resid_post"
    return f"blocks.{match['layer']}.hook_mlp_out" if match["rest"] in _MLP else None


def hook_input(module: str) -> str | None:
    """The hook id of a module's input; None if there is none for it."""
    match = _MODULE.search(module)
    if match is None:
        return None
    if match["rest"] is None:
        return f"blocks.{match['layer']}.hook_resid_pre"
    return f"blocks.{match['layer']}.hook_mlp_in" if match["rest"] == "mlp" else None


def layer_in(path: Path, pattern: str) -> int | None:
    """The layer's number in the last part of `path` that matches `pattern`, whose first group it is."""
    for part in reversed(path.parts):
        match = re.search(pattern, part)
        if match is not None:
            return int(match[1])
    return None


def choose_hook(options: SourceOptions, found: str | None, path: Path, source: str) -> str:
    """The caller's hook point, else the one found. Raises BankError if there is neither; `source` says where one
    was looked for."""
    hook_name = options.hook_name or found
    if hook_name is None:
        raise BankError(
            f"no hook point can be told from {source}; name it, such as blocks.12.hook_resid_post",
            file=str(path),
            field="hook_name",
        )
    return hook_name

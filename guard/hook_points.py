"""From public hook ids (TransformerLens names) to modules of a Hugging Face model, per architecture."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import nn

from guard.errors import GuardError

Site = Literal["resid_pre", "resid_post", "mlp_out"]
_PATTERN = re.compile(r"blocks\.(0|[1-9][0-9]*)\.hook_(resid_pre|resid_post|mlp_out)")


class HookPoint(NamedTuple):
    """A place in the model: the block's number and the site in it."""

    layer: int
    site: Site

    @property
    def name(self) -> str:
        """The public id, as `parse_hook_name` reads it."""
        return f"blocks.{self.layer}.hook_{self.site}"


class HookTarget(NamedTuple):
    """The module to hook, and whether the activation is its first input (True) or its output (False)."""

    module: nn.Module
    takes_input: bool


class _Paths(NamedTuple):
    blocks: str
    mlp: str


# The residual stream of all of these is the plain output of the decoder layer (the true sum).
_ARCHITECTURES: dict[str, _Paths] = {
    name: _Paths("model.layers", "mlp")
    for name in (
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "MistralForCausalLM",
    )
}


def parse_hook_name(name: str) -> HookPoint:
    """`blocks.14.hook_resid_post` -> HookPoint(14, "resid_post"). Raises GuardError for any other form."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        raise GuardError(
            f"hook point {name!r} is not known; use blocks.LAYER.hook_resid_pre, hook_resid_post or hook_mlp_out"
        )
    return HookPoint(int(match[1]), match[2])  # type: ignore[arg-type]  # the pattern admits only these sites


def resolve(model: nn.Module, name: str) -> HookTarget:
    """The module behind a hook id in `model`.

    Raises GuardError for an architecture outside the table or a layer the model does not have.
    """
    point = parse_hook_name(name)
    blocks, paths = _blocks(model)
    if point.layer >= len(blocks):
        raise GuardError(f"hook point {name!r}: the model has layers 0 to {len(blocks) - 1}")
    block = blocks[point.layer]
    if point.site == "mlp_out":
        return HookTarget(block.get_submodule(paths.mlp), takes_input=False)
    return HookTarget(block, takes_input=point.site == "resid_pre")


def blocks_before(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks that end at or before a hook point; raises as `resolve` does."""
    resolve(model, name)
    point = parse_hook_name(name)
    blocks, _ = _blocks(model)
    return list(blocks)[: point.layer + (point.site == "resid_post")]


def _blocks(model: nn.Module) -> tuple[nn.ModuleList, _Paths]:
    paths = _ARCHITECTURES.get(type(model).__name__)
    if paths is None:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise GuardError(f"architecture {type(model).__name__!r} is not in the hook table; known are {known}")
    blocks = model.get_submodule(paths.blocks)
    assert isinstance(blocks, nn.ModuleList)  # so it is in every architecture of the table
    return blocks, paths


def execution_order(name: str) -> tuple[int, int]:
    """Sort key that follows the forward pass."""
    point = parse_hook_name(name)
    return point.layer, ("resid_pre", "mlp_out", "resid_post").index(point.site)

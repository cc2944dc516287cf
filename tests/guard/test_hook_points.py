"""Hook ids are read strictly and resolve to the modules that carry the named activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from guard.capture import Capture
from guard.errors import GuardError
from guard.hook_points import HookPoint, execution_order, parse_hook_name, resolve


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
@pytest.mark.parametrize("layer", [0, 7, 10, 31])
def test_name_survives_parsing(layer: int, site: Any) -> None:
    name = f"blocks.{layer}.hook_{site}"
    assert parse_hook_name(name) == HookPoint(layer, site)
    assert parse_hook_name(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.1",
        "blocks.-1.hook_resid_post",
        "blocks.01.hook_resid_post",
        "blocks.٣.hook_resid_post",
        "blocks.1.hook_resid_post ",
        "blocks.1.hook_resid_mid",
        "model.layers.1",
        "xblocks.1.hook_resid_post",
        "blocks.1.hook_resid_post\n",
    ],
)
def test_other_forms_are_refused_by_value(name: str) -> None:
    with pytest.raises(GuardError) as error:
        parse_hook_name(name)
    assert repr(name) in str(error.value)


def test_layer_beyond_the_model_is_refused(tiny_model: Any) -> None:
    with pytest.raises(GuardError, match=r"blocks\.4\.hook_resid_post.* layers 0 to 3"):
        resolve(tiny_model, "blocks.4.hook_resid_post")


def test_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(GuardError, match=r"'Linear' is not in the hook table; known are .*LlamaForCausalLM"):
        resolve(nn.Linear(1, 1), "blocks.0.hook_resid_post")


def test_modules_are_those_of_the_table(tiny_model: Any) -> None:
    layers = tiny_model.model.layers
    assert resolve(tiny_model, "blocks.2.hook_resid_pre") == (layers[2], True)
    assert resolve(tiny_model, "blocks.2.hook_resid_post") == (layers[2], False)
    assert resolve(tiny_model, "blocks.2.hook_mlp_out") == (layers[2].mlp, False)


def test_execution_order_is_that_of_the_forward_pass(tiny_model: Any) -> None:
    names = [f"blocks.{layer}.hook_{site}" for site in ("mlp_out", "resid_post", "resid_pre") for layer in (2, 0, 1)]
    seen: list[str] = []
    with Capture(tiny_model, names, lambda name, hidden: seen.append(name)), torch.inference_mode():  # type: ignore[func-returns-value]
        tiny_model(torch.tensor([[5, 6]]))
    assert seen == sorted(names, key=execution_order)


def test_input_of_a_block_is_the_output_of_the_one_before(tiny_model: Any) -> None:
    found: dict[str, torch.Tensor] = {}
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"]
    with Capture(tiny_model, names, lambda name, hidden: found.update({name: hidden})), torch.inference_mode():  # type: ignore[func-returns-value]
        tiny_model(torch.tensor([[5, 6, 7]]))
    assert torch.equal(*(found[name] for name in names))

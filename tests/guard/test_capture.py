"""Captured activations are the model's own to the bit, and nothing behind the last hook point is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from guard.capture import Capture, length_batches, pad_batch, truncated_forward
from guard.errors import GuardError
from tests.factories import hooks_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def hidden_states(model: Any) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        output = model(IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    states: tuple[Tensor, ...] = output.hidden_states
    return states


def test_truncated_forward_equals_the_full_one_bit_for_bit(tiny_model: Any) -> None:
    states = hidden_states(tiny_model)
    names = [f"blocks.{layer}.hook_{site}" for layer in (2, 0) for site in ("resid_post", "resid_pre")]
    found = truncated_forward(tiny_model, names, IDS, MASK)
    assert set(found) == set(names)
    for layer in (0, 2):
        assert torch.equal(found[f"blocks.{layer}.hook_resid_pre"], states[layer])
        assert torch.equal(found[f"blocks.{layer}.hook_resid_post"], states[layer + 1])


def test_mlp_output_is_what_the_block_adds_last(tiny_model: Any) -> None:
    found = truncated_forward(tiny_model, ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"], IDS, MASK)
    block = tiny_model.model.layers[1]
    before = found["blocks.1.hook_resid_post"] - found["blocks.1.hook_mlp_out"]
    with torch.inference_mode():
        again = block.mlp(block.post_attention_layernorm(before))
    torch.testing.assert_close(again, found["blocks.1.hook_mlp_out"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("last", "layers", "mlps"),
    [
        ("blocks.1.hook_resid_pre", [0], [0]),
        ("blocks.1.hook_mlp_out", [0], [0, 1]),
        ("blocks.1.hook_resid_post", [0, 1], [0, 1]),
    ],
)
def test_nothing_behind_the_last_hook_point_is_computed(
    tiny_model: Any, last: str, layers: list[int], mlps: list[int]
) -> None:
    finished: list[tuple[str, int]] = []
    for number, layer in enumerate(tiny_model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=number: finished.append(("mlp", n)))
        layer.register_forward_hook(lambda *_, n=number: finished.append(("layer", n)))
    for module in (tiny_model.model.norm, tiny_model.lm_head):
        module.register_forward_hook(lambda *_: finished.append(("head", 0)))
    truncated_forward(tiny_model, ["blocks.0.hook_resid_post", last], IDS, MASK)
    assert [n for kind, n in finished if kind == "layer"] == layers
    assert [n for kind, n in finished if kind == "mlp"] == mlps
    assert ("head", 0) not in finished


def test_hooks_are_gone_after_success_and_after_failure(tiny_model: Any) -> None:
    truncated_forward(tiny_model, ["blocks.0.hook_resid_post"], IDS)
    assert hooks_of(tiny_model) == 0
    with pytest.raises(GuardError):
        truncated_forward(tiny_model, ["blocks.0.hook_resid_post", "blocks.9.hook_resid_post"], IDS)
    with pytest.raises(IndexError):
        truncated_forward(tiny_model, ["blocks.0.hook_resid_post"], torch.tensor([[10**6]]))
    assert hooks_of(tiny_model) == 0


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out"])
def test_returned_activation_replaces_the_models_own(tiny_model: Any, site: str) -> None:
    name = f"blocks.2.hook_{site}"
    with torch.inference_mode():
        before = tiny_model(IDS).logits
        with Capture(tiny_model, [name], lambda _, hidden: None):
            assert torch.equal(tiny_model(IDS).logits, before)
        with Capture(tiny_model, [name], lambda _, hidden: hidden * 1.0):
            assert torch.equal(tiny_model(IDS).logits, before)
        with Capture(tiny_model, [name], lambda _, hidden: hidden + 1.0):
            assert not torch.equal(tiny_model(IDS).logits, before)
        assert torch.equal(tiny_model(IDS).logits, before)


def test_batch_is_padded_on_the_right() -> None:
    ids, mask = pad_batch([[5, 6], [], [7]], 9, torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [9, 9], [7, 9]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_batches_hold_every_place_once_the_short_ones_first_and_never_more_than_allowed() -> None:
    lengths = [5, 1, 30, 4, 4, 0, 9]
    batches = list(length_batches(lengths, 12))
    assert batches == [[5, 1, 3], [4, 0], [6], [2]]  # the one that is too long alone is still read
    assert list(length_batches([], 12)) == []

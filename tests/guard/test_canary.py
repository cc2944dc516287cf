"""The canary: the model that the bank was made for passes, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from feature_bank.errors import BankError
from guard.core import Guard
from guard.errors import CanaryError
from tests.factories import hooks_of, make_policy
from tests.guard.conftest import MakeBank


def test_own_model_passes_in_either_dtype(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(bank_of(), make_policy())
    guard.attach(tiny_model, tiny_tokenizer).close()


@pytest.mark.parametrize("layer", [0, 3])
def test_perturbed_weights_fail(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any, layer: int) -> None:
    guard = Guard(bank_of(), make_policy())
    with torch.no_grad():
        weight = tiny_model.model.layers[layer].mlp.down_proj.weight
        weight += torch.randn_like(weight) * 0.05
    with pytest.raises(CanaryError, match="off the recorded ones"):
        guard.attach(tiny_model, tiny_tokenizer)
    assert hooks_of(tiny_model) == 0
    assert "generate" not in vars(tiny_model)


def test_model_that_gives_nan_fails(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(bank_of(), make_policy())
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(CanaryError):
        guard.attach(tiny_model, tiny_tokenizer)


def test_model_of_another_shape_is_refused_before_the_canary(
    bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    guard = Guard(bank_of(), make_policy())
    tiny_model.config.num_hidden_layers = 5
    with pytest.raises(BankError, match=r"made for model 'tiny-llama'.* n_layers") as error:
        guard.attach(tiny_model, tiny_tokenizer)
    assert (error.value.file, error.value.field) == ("bank.json", "model.n_layers")


def test_layer_that_is_skipped_is_noticed(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any) -> None:
    guard = Guard(bank_of(), make_policy())
    tiny_model.model.layers[1].forward = lambda hidden, **_: hidden
    with pytest.raises(CanaryError):
        guard.attach(tiny_model, tiny_tokenizer)

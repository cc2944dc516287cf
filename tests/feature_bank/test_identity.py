"""A bank knows the model and tokenizer it was made for, however they were loaded, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from feature_bank.errors import BankError
from feature_bank.identity import check_identity, identify


def test_identity_survives_saving_and_loading_in_another_dtype(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert identify(model, tokenizer, "x") == identify(tiny_model, tiny_tokenizer, "x")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_hidden_layers", 5, "n_layers"),
        ("hidden_size", 64, "d_model"),
        ("intermediate_size", 65, "config_hash"),
        ("rms_norm_eps", 0.5, "config_hash"),
        ("vocab_size", 261, "config_hash"),
    ],
)
def test_other_model_is_refused_by_what_differs(
    tiny_model: Any, tiny_tokenizer: Any, field: str, value: Any, named: str
) -> None:
    expected = identify(tiny_model, tiny_tokenizer, "tiny")
    setattr(tiny_model.config, field, value)
    with pytest.raises(BankError, match=f"'tiny'.* differs in {named}") as error:
        check_identity(tiny_model, tiny_tokenizer, expected)
    assert (error.value.file, error.value.field) == ("bank.json", f"model.{named}")


def test_other_tokenizer_is_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    expected = identify(tiny_model, tiny_tokenizer, "tiny")
    template = tiny_tokenizer.chat_template
    try:
        tiny_tokenizer.chat_template = template + " "
        with pytest.raises(BankError, match="tokenizer_hash"):
            check_identity(tiny_model, tiny_tokenizer, expected)
    finally:
        tiny_tokenizer.chat_template = template
    check_identity(tiny_model, tiny_tokenizer, expected)

"""Qwen-Scope files: the documented formula, and `k` from the repository's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from feature_bank.errors import BankError
from feature_bank.formats import load_sae, read_source
from tests.feature_bank.formats import samples
from tests.feature_bank.formats.samples import D_IN, normal, qwen_tensors

REPOSITORY = "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_5/snapshots/0"


def test_layout_and_formula(tmp_path: Path) -> None:
    t, x = qwen_tensors(), normal(40, D_IN)
    source = read_source(samples.write_torch(tmp_path / REPOSITORY / "layer14.sae.pt", t))
    acts = samples.top_k(x @ t["W_enc"].T + t["b_enc"], 5)
    torch.testing.assert_close(source.sae.encode(x), acts)
    torch.testing.assert_close(source.sae.reconstruct(x), acts @ t["W_dec"].T + t["b_dec"])
    assert (source.sae.hook_name, source.sae.k) == ("blocks.14.hook_resid_post", 5)
    assert source.model_name == "Qwen/Qwen3-1.7B-Base"


def test_k_must_be_given_where_the_folder_is_named_otherwise(tmp_path: Path) -> None:
    file = samples.write_torch(tmp_path / "layer3.sae.pt", qwen_tensors())
    with pytest.raises(BankError, match="give it as k") as error:
        load_sae(file)
    assert (error.value.file, error.value.field) == (str(file), "k")
    assert load_sae(file, k=7).k == 7
    with pytest.raises(BankError) as error:
        load_sae(file, k=25)
    assert error.value.field == "k"


def test_given_k_wins_over_the_name(tmp_path: Path) -> None:
    assert load_sae(samples.write_torch(tmp_path / REPOSITORY / "layer3.sae.pt", qwen_tensors()), k=3).k == 3


def test_folder_of_one_file_will_do_and_of_several_will_not(tmp_path: Path) -> None:
    samples.write_torch(tmp_path / "layer3.sae.pt", qwen_tensors())
    assert load_sae(tmp_path, k=3).hook_name == "blocks.3.hook_resid_post"
    samples.write_torch(tmp_path / "layer4.sae.pt", qwen_tensors())
    with pytest.raises(BankError, match="2 files"):
        load_sae(tmp_path, k=3)

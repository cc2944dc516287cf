"""A selection of an SAE's features gives the activations that the whole gives; malformed SAEs are refused by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feature_bank.errors import BankError
from feature_bank.sae import SAE

D_IN, D_SAE = 16, 48


def make_sae(*, apply_b_dec_to_input: bool = True) -> SAE:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.randn(D_SAE, D_IN, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    return SAE(
        W_enc=decoder.T.clone(),
        W_dec=decoder,
        b_enc=torch.randn(D_SAE, generator=generator) * 0.1,
        b_dec=torch.randn(D_IN, generator=generator),
        threshold=torch.rand(D_SAE, generator=generator) * 0.5,
        hook_name="blocks.1.hook_resid_post",
        apply_b_dec_to_input=apply_b_dec_to_input,
    )


@given(
    indices=st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=20),
    subtract=st.booleans(),
    seed=st.integers(0, 99),
)
def test_selection_encodes_as_the_whole(indices: list[int], subtract: bool, seed: int) -> None:
    sae = make_sae(apply_b_dec_to_input=subtract)
    x = torch.randn(10, D_IN, generator=torch.Generator().manual_seed(seed))
    whole, part = sae.encode(x)[:, indices], sae.select(indices).encode(x)
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-6)
    assert torch.equal(part > 0, whole > 0)


def test_activation_is_the_pre_activation_above_the_threshold_and_zero_below() -> None:
    sae = make_sae()
    x = torch.randn(50, D_IN)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = torch.where(pre > sae.threshold, pre, 0.0)
    torch.testing.assert_close(sae.encode(x), expected)
    assert 0 < (expected > 0).float().mean() < 1


def test_decode_is_linear_in_the_activations() -> None:
    sae = make_sae()
    acts = torch.rand(5, D_SAE)
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("index", [-1, D_SAE])
def test_feature_outside_the_dictionary_is_refused(index: int) -> None:
    with pytest.raises(BankError, match=f"feature {index} is outside the dictionary of {D_SAE}") as error:
        make_sae().select([0, index])
    assert error.value.field == "indices"


@pytest.mark.parametrize("field", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_shape_that_does_not_fit_is_refused_by_field(field: str) -> None:
    sae = make_sae()
    with pytest.raises(BankError, match="shape") as error:
        replace(sae, **{field: getattr(sae, field).flatten()[:-1]})
    assert error.value.field == field


def test_errors_carry_file_and_field_in_the_message(tmp_path: Path) -> None:
    error = BankError("is bad", file="x.json", field="y")
    assert (error.file, error.field, str(error)) == ("x.json", "y", "file 'x.json' field 'y': is bad")
    assert str(BankError("is bad")) == "is bad"

"""A selection of an SAE's features gives the activations that the whole gives; malformed SAEs are refused by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feature_bank.errors import BankError
from feature_bank.sae import SAE, fold_gated

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


def make_top_k(k: int, **changes: object) -> SAE:
    return replace(make_sae(), threshold=torch.zeros(D_SAE), k=k, **changes)


def make_transcoder(d_out: int = 10, *, skip: bool = True) -> SAE:
    generator = torch.Generator().manual_seed(2)
    return replace(
        make_sae(apply_b_dec_to_input=False),
        W_dec=torch.randn(D_SAE, d_out, generator=generator),
        b_dec=torch.randn(d_out, generator=generator),
        W_skip=torch.randn(D_IN, d_out, generator=generator) if skip else None,
        hook_name="blocks.1.hook_mlp_in",
        hook_name_out="blocks.1.hook_mlp_out",
    )


@given(k=st.integers(1, D_SAE), seed=st.integers(0, 99))
def test_top_k_keeps_the_largest_positive_pre_activations(k: int, seed: int) -> None:
    sae = make_top_k(k)
    x = torch.randn(7, D_IN, generator=torch.Generator().manual_seed(seed))
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    rank = pre.argsort(dim=1, descending=True).argsort(dim=1)
    assert torch.equal(sae.encode(x), torch.where((rank < k) & (pre > 0), pre, 0.0))


def test_top_k_of_the_whole_dictionary_is_relu() -> None:
    x = torch.randn(9, D_IN)
    assert torch.equal(make_top_k(D_SAE).encode(x), make_top_k(1).with_threshold(0.0).encode(x))


def test_top_k_cuts_at_the_threshold_too() -> None:
    sae = replace(make_sae(), k=5)
    acts = sae.encode(torch.randn(50, D_IN))
    fires = acts > 0
    assert int(fires.sum(1).max()) <= 5
    assert bool((acts > sae.threshold)[fires].all())


def test_encoding_does_not_depend_on_the_shape_of_the_batch() -> None:
    for sae in (make_sae(), make_top_k(4)):
        x = torch.randn(2, 3, D_IN)
        torch.testing.assert_close(sae.encode(x), torch.stack([sae.encode(row) for row in x]))
        assert sae.encode(x[0, 0]).shape == (D_SAE,)


@pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
def test_k_outside_the_dictionary_is_refused(k: int) -> None:
    with pytest.raises(BankError, match=f"{k} is not between 1 and the {D_SAE}") as error:
        make_top_k(k)
    assert error.value.field == "k"


def test_selecting_from_top_k_needs_thresholds_first() -> None:
    sae = make_top_k(4)
    for cut in (sae.rows, lambda: sae.select([1])):
        with pytest.raises(BankError, match="with_threshold") as error:
            cut()
        assert error.value.field == "k"
    stand_in = sae.with_threshold(torch.full((D_SAE,), 0.3))
    x = torch.randn(20, D_IN)
    torch.testing.assert_close(stand_in.select([3, 1]).encode(x), stand_in.encode(x)[:, [3, 1]])


def test_rows_are_all_there_is_to_the_encoding() -> None:
    for sae in (make_sae(), make_sae(apply_b_dec_to_input=False)):
        weight, bias, threshold = sae.rows()
        x = torch.randn(20, D_IN)
        pre = x @ weight + bias
        torch.testing.assert_close(torch.where(pre > threshold, pre, 0.0), sae.encode(x), atol=1e-5, rtol=1e-5)


def test_threshold_may_be_one_number_or_one_a_feature() -> None:
    one, each = make_top_k(4).with_threshold(0.25), make_sae().with_threshold(torch.full((D_SAE,), 0.25))
    assert one.k is None
    assert torch.equal(one.threshold, each.threshold)
    for wrong in (-0.5, torch.zeros(3)):
        with pytest.raises(BankError) as error:
            make_sae().with_threshold(wrong)
        assert error.value.field == "threshold"


@pytest.mark.parametrize("skip", [True, False])
def test_transcoder_predicts_its_output_from_its_input(skip: bool) -> None:
    sae = make_transcoder(skip=skip)
    x = torch.randn(6, D_IN)
    pre = x @ sae.W_enc + sae.b_enc
    expected = torch.where(pre > sae.threshold, pre, 0.0) @ sae.W_dec + sae.b_dec
    if sae.W_skip is not None:
        expected = expected + x @ sae.W_skip
    torch.testing.assert_close(sae.reconstruct(x), expected)
    assert (sae.d_in, sae.d_sae, sae.d_out, sae.is_transcoder) == (D_IN, D_SAE, 10, True)


def test_without_a_skip_reconstructing_is_decoding_the_encoding() -> None:
    sae = make_sae()
    x = torch.randn(6, D_IN)
    assert torch.equal(sae.reconstruct(x), sae.decode(sae.encode(x)))
    assert (sae.d_out, sae.is_transcoder) == (D_IN, False)


def test_selection_of_a_transcoder_keeps_what_it_predicts() -> None:
    sae = make_transcoder()
    part, x = sae.select([5, 0]), torch.randn(4, D_IN)
    torch.testing.assert_close(part.encode(x), sae.encode(x)[:, [5, 0]])
    assert (part.hook_name_out, part.d_out) == (sae.hook_name_out, 10)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"W_dec": torch.zeros(D_SAE, D_IN)}, "b_dec"),
        ({"b_dec": torch.zeros(D_IN)}, "b_dec"),
        ({"W_skip": torch.zeros(10, D_IN)}, "W_skip"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"hook_name_out": None}, "W_dec"),
    ],
)
def test_transcoder_that_does_not_fit_together_is_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(BankError) as error:
        replace(make_transcoder(), **change)
    assert error.value.field == field


def test_skip_belongs_to_a_transcoder() -> None:
    with pytest.raises(BankError, match="hook_name_out") as error:
        replace(make_sae(), W_skip=torch.zeros(D_IN, D_IN))
    assert error.value.field == "W_skip"


def test_negative_threshold_is_refused() -> None:
    with pytest.raises(BankError, match="negative") as error:
        replace(make_sae(), threshold=torch.full((D_SAE,), -0.1))
    assert error.value.field == "threshold"


def test_encoder_alone_encodes_but_refuses_to_decode() -> None:
    sae = replace(make_sae(), encoder_only=True)
    x = torch.randn(3, D_IN)
    assert torch.equal(sae.encode(x), make_sae().encode(x))
    for decode in (sae.reconstruct, lambda x: sae.decode(sae.encode(x)), sae.select([1, 2]).reconstruct):
        with pytest.raises(BankError, match="neither reconstruct nor steer"):
            decode(x)


@given(seed=st.integers(0, 99))
def test_folded_gate_gives_the_activations_of_the_gated_sae(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator)
    b_gate, b_mag, r_mag = (torch.randn(D_SAE, generator=generator) for _ in range(3))
    x = torch.randn(40, D_IN, generator=generator)
    projection = x @ W_enc
    gate = projection + b_gate > 0
    expected = gate * torch.relu(projection * r_mag.exp() + b_mag)
    W_enc, b_enc, threshold = fold_gated(W_enc, b_gate, b_mag, r_mag)
    found = replace(make_sae(apply_b_dec_to_input=False), W_enc=W_enc, b_enc=b_enc, threshold=threshold).encode(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found > 0, expected > 0)

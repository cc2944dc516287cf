"""What is exported computes what was trained, in the data's own units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from feature_bank.sae import SAE
from tests.training.samples import sparse_data
from tests.training.test_architectures import HOOK, HOOK_OUT, NAMES, adam, create, step, target_of
from training.architectures import Gated, JumpReLU, ReLU, SkipTranscoder, TopK
from training.kernels import topk_rows

BATCH = 256


@pytest.fixture(params=NAMES)
def trained(request: pytest.FixtureRequest) -> Any:
    """An architecture after a few steps in double precision, so that no parameter is what it started from."""
    data = 7.5 * sparse_data(1024).double()
    sae = create(request.param, data)
    optimiser = adam(sae, lr=2e-2)
    for batch in torch.split(data, 128):
        step(sae, optimiser, batch)
    return sae


def dense_acts(sae: Any, x: Tensor) -> Tensor:
    """The activations at training time, written out; (batch, d_sae), in normalised units."""
    x = x / sae.norm
    centred = x if isinstance(sae, SkipTranscoder) else x - sae.b_dec
    shared = centred @ sae.W_enc
    if isinstance(sae, Gated):
        gate = shared + sae.b_gate
        return (gate > 0) * (shared * sae.r_mag.exp() + sae.b_mag).relu()
    pre = shared + sae.b_enc
    if isinstance(sae, TopK):
        return topk_rows(pre, sae.options.k).to_dense()
    if isinstance(sae, ReLU):
        return pre.relu()
    if isinstance(sae, JumpReLU):
        return pre * (pre > sae.threshold)
    found, count = pre.flatten().sort(descending=True).values, sae.options.k * len(x)
    sae.threshold = float(found[count - 1 : count + 1].mean())  # what the moving average stands for
    return pre * (pre >= found[count - 1])


def test_encode_gives_the_activations_and_reconstruct_the_output_of_training(trained: Any) -> None:
    data = 7.5 * sparse_data(BATCH, seed=1).double()
    acts = dense_acts(trained, data)
    exported: SAE = trained.export(HOOK)
    assert exported.hook_name == HOOK
    scale = getattr(trained, "norm_out", trained.norm)
    assert abs(scale - 1) > 0.5  # or a forgotten factor would not be seen
    torch.testing.assert_close(exported.encode(data), scale * acts)
    out = acts @ trained.W_dec + trained.b_dec
    target = data
    if isinstance(trained, SkipTranscoder):
        target = target_of(data)
        out = out + data / trained.norm @ trained.W_skip
        assert float(trained.W_skip.abs().sum()) > 0
    torch.testing.assert_close(exported.reconstruct(data), scale * out)
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(trained.d_sae, dtype=torch.float64))
    # and the step reports the error of that reconstruction
    _, stats = trained.gradients(data, target)
    fvu = (exported.reconstruct(data) - target).pow(2).sum() / (target - target.mean(0)).pow(2).sum()
    assert stats.fvu == pytest.approx(float(fvu))
    assert stats.l0 == float((acts > 0).sum()) / BATCH


def test_the_export_is_a_contiguous_copy(trained: Any) -> None:
    exported = trained.export(HOOK)
    names = ["W_enc", "W_dec", "b_enc", "b_dec", "threshold", *(["W_skip"] if exported.W_skip is not None else [])]
    before = {name: getattr(exported, name).clone() for name in names}
    for parameter in trained.parameters().values():
        parameter += 1
    for name in names:
        assert getattr(exported, name).is_contiguous(), name
        assert torch.equal(getattr(exported, name), before[name]), name


def test_a_single_input_is_copied_too() -> None:
    data = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    sae = TopK.create(data, d_sae=3, seed=0, dead_after_tokens=1, options=TopK.Options(k=1))
    exported = sae.export(HOOK)
    sae.W_enc_T += 1
    assert not torch.equal(exported.W_enc, sae.W_enc)


def test_the_forms_that_users_meet() -> None:
    data = sparse_data(64)
    kinds = {name: create(name, data) for name in NAMES}
    for sae in kinds.values():
        sae.gradients(data, target_of(data))
    exported = {name: sae.export(HOOK) for name, sae in kinds.items()}
    assert {name: sae.k for name, sae in exported.items() if sae.k} == {"topk": 4, "skip_transcoder": 4}
    for name in ("batch_topk", "matryoshka_batch_topk"):
        assert len(set(exported[name].threshold.tolist())) == 1
        assert float(exported[name].threshold[0]) > 0
    assert float(exported["relu"].threshold.abs().max()) == 0
    transcoder = exported["skip_transcoder"]
    assert (transcoder.hook_name, transcoder.hook_name_out) == (HOOK, HOOK_OUT)
    assert transcoder.d_out == 12


def test_a_gate_that_opens_below_zero_magnitude_stays_shut_in_the_exported_form() -> None:
    data = sparse_data(64).double()
    sae = create("gated", data)
    generator = torch.Generator().manual_seed(0)
    for parameter in (sae.b_gate, sae.b_mag, sae.r_mag):
        parameter.copy_(torch.randn(sae.d_sae, generator=generator, dtype=torch.float64))
    threshold = sae.b_mag - sae.r_mag.exp() * sae.b_gate
    assert bool((threshold < 0).any())
    assert bool((threshold > 0).any())
    torch.testing.assert_close(sae.export(HOOK).encode(data), sae.norm * dense_acts(sae, data))

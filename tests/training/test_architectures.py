"""What every architecture keeps to: the unit sphere, exact resume, a faithful export, errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from feature_bank.errors import DataError
from tests.training.samples import sparse_data
from training.architectures import ARCHITECTURES, Architecture, StepStats

D_IN, D_SAE, K = 16, 48, 4
HOOK, HOOK_OUT = "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"
NAMES = list(ARCHITECTURES)
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"coefficient": 1.0},
    "gated": {"coefficient": 1.0},
    "jumprelu": {"l0_target": float(K)},
}


def arguments(name: str, data: Tensor, **fields: Any) -> dict[str, Any]:
    """For `create`, with a target if the architecture wants one."""
    chosen = {"d_sae": D_SAE, "seed": 0, "dead_after_tokens": 10**9, **fields}
    options = {**OPTIONS.get(name, {"k": K}), **chosen.pop("options", {})}
    chosen["options"] = ARCHITECTURES[name].Options(**options)
    if name == "skip_transcoder":
        chosen.update(target_sample=target_of(data), hook_name_out=HOOK_OUT)
    return chosen


def create(name: str, data: Tensor, **fields: Any) -> Any:
    return ARCHITECTURES[name].create(data, **arguments(name, data, **fields))


def target_of(x: Tensor) -> Tensor:
    """(batch, 12) a smooth function of the input: what a transcoder predicts here."""
    weight = torch.randn(D_IN, 12, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    return torch.tanh(x @ weight / 5) * 3 + 1


def step(sae: Architecture, optimiser: torch.optim.Adam, x: Tensor, progress: float = 1.0) -> StepStats:
    target = target_of(x) if sae.name == "skip_transcoder" else None
    grads, stats = sae.gradients(x, target, progress)
    for name, parameter in sae.parameters().items():
        parameter.grad = grads[name]
    optimiser.step()
    sae.renormalise()
    return stats


def adam(sae: Architecture, lr: float = 3e-3) -> torch.optim.Adam:
    return torch.optim.Adam(list(sae.parameters().values()), lr=lr, fused=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_name_finds_the_class_and_its_options_refuse_what_they_do_not_know(name: str) -> None:
    assert ARCHITECTURES[name].name == name
    with pytest.raises(ValidationError, match="nonsense"):
        ARCHITECTURES[name].Options(nonsense=1)
    with pytest.raises(ValidationError, match="frozen"):
        ARCHITECTURES[name].Options().b_dec_init = "mean"


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_fits_its_parameter_and_every_parameter_is_contiguous(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data)
    grads, stats = sae.gradients(data, target_of(data))
    assert grads.keys() == sae.parameters().keys()
    for key, parameter in sae.parameters().items():
        assert parameter.is_contiguous(), key
        assert not parameter.requires_grad, key
        assert grads[key].shape == parameter.shape, key
        assert grads[key].stride() == parameter.stride(), key
        assert bool(torch.isfinite(grads[key]).all()), key
    assert stats.fvu > 0
    assert 0 < stats.l0 <= D_SAE


@pytest.mark.parametrize("name", NAMES)
def test_the_decoders_gradient_has_no_radial_part_and_steps_keep_it_on_the_sphere(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data, dead_after_tokens=1)
    optimiser = adam(sae)
    for _ in range(3):
        step(sae, optimiser, data)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    grads, _ = sae.gradients(data, target_of(data))
    assert float((grads["W_dec"] * sae.W_dec).sum(1).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_training_finds_sparse_structure(name: str) -> None:
    data = sparse_data(1024)
    sae = create(name, data, dead_after_tokens=2000)
    optimiser = adam(sae, lr=5e-3)
    order = torch.Generator().manual_seed(0)
    seen = [step(sae, optimiser, data[torch.randint(0, 1024, (128,), generator=order)], i / 150) for i in range(150)]
    last = seen[-20:]
    assert sum(s.fvu for s in last) / 20 < 0.25
    assert sum(s.l0 for s in last) / 20 < 12
    assert min(s.fvu for s in last) < 0.5 * seen[0].fvu


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_from_parameters_moments_and_buffers_goes_on_bit_for_bit(name: str) -> None:
    data = sparse_data(256)
    batches = torch.split(data, 32)

    def run(sae: Architecture, optimiser: torch.optim.Adam, steps: range) -> list[StepStats]:
        return [step(sae, optimiser, batches[i], i / 8) for i in steps]

    whole = create(name, data, dead_after_tokens=40)
    expected = run(whole, adam(whole), range(8))

    first = create(name, data, dead_after_tokens=40)
    optimiser = adam(first)
    run(first, optimiser, range(4))
    second = create(name, data[:100], dead_after_tokens=40, seed=5)  # whatever it starts from is replaced
    for key, parameter in first.parameters().items():
        second.parameters()[key].copy_(parameter)
    second.load_buffers({key: value.clone() for key, value in first.buffers().items()})
    resumed = adam(second)
    resumed.load_state_dict(optimiser.state_dict())
    assert run(second, resumed, range(4, 8)) == expected[4:]
    for kind in ("parameters", "buffers"):
        theirs = getattr(whole, kind)()
        for key, value in getattr(second, kind)().items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_copies_and_wrong_ones_are_refused_by_name(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data)
    kept = sae.buffers()
    sae.gradients(data, target_of(data))
    assert bool((kept["tokens_since_fired"] == 0).all())
    for key in kept:
        with pytest.raises(DataError, match=f"buffer '{key}'"):
            sae.load_buffers({other: value for other, value in kept.items() if other != key})
    with pytest.raises(DataError, match=r"buffer 'tokens_since_fired'.*expected"):
        sae.load_buffers({**kept, "tokens_since_fired": torch.zeros(3, dtype=torch.long)})


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_start_and_another_one_does_not(name: str) -> None:
    data = sparse_data(64)
    first, second, third = (create(name, data, seed=seed) for seed in (3, 3, 4))
    for key, parameter in first.parameters().items():
        assert torch.equal(parameter, second.parameters()[key]), key
    assert not torch.equal(first.W_dec, third.W_dec)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("b_dec_init", ["mean", "geometric_median"])
def test_b_dec_starts_at_the_centre_of_what_is_reconstructed(name: str, b_dec_init: str) -> None:
    data = sparse_data(512)
    data[0] *= 100  # which draws the mean, not the median
    goal = target_of(data) if name == "skip_transcoder" else data
    sae = create(name, data, options={"b_dec_init": b_dec_init})
    start = sae.b_dec * getattr(sae, "norm_out", sae.norm)
    if b_dec_init == "mean":
        torch.testing.assert_close(start, goal.mean(0))
        return
    pull = goal - start  # at the geometric median the unit vectors towards the points cancel
    assert float((pull / pull.norm(dim=1, keepdim=True)).mean(0).norm()) < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_scaled_data_give_the_same_training(name: str) -> None:
    if name == "skip_transcoder":
        pytest.skip("the target here is no linear function of the input")
    data = sparse_data(64, seed=2)
    grads, stats = create(name, data).gradients(data)
    scaled, scaled_stats = create(name, 1000 * data).gradients(1000 * data)
    assert scaled_stats == pytest.approx(stats, rel=1e-3)
    for key, grad in grads.items():
        torch.testing.assert_close(scaled[key], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name: str) -> None:
    data = sparse_data(64)
    sae = create(name, data, dead_after_tokens=1)
    before, target = data.clone(), target_of(data)
    for _ in range(2):
        sae.gradients(data, target)
    assert torch.equal(data, before)
    assert torch.equal(target, target_of(data))


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_gradients_stay_near_and_in_full_precision(name: str) -> None:
    data = sparse_data(256)
    exact, _ = create(name, data).gradients(data, target_of(data))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, stats = create(name, data, dead_after_tokens=1).gradients(data, target_of(data))
    assert stats.fvu > 0
    for key, grad in rough.items():
        assert grad.dtype == torch.float32, key
        along = float(torch.nn.functional.cosine_similarity(grad.flatten(), exact[key].flatten(), dim=0))
        assert along > 0.9, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(8, D_IN), "every activation of the sample is zero"),
        (torch.full((8, D_IN), torch.nan), "NaN or infinity"),
        (torch.zeros(0, D_IN), "rows of activations are needed"),
    ],
)
def test_a_sample_without_a_scale_is_refused(name: str, sample: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ARCHITECTURES[name].create(sample, **arguments(name, torch.randn(8, D_IN)))


@pytest.mark.parametrize("name", NAMES)
def test_another_architectures_options_are_refused(name: str) -> None:
    data = sparse_data(64)
    other = "relu" if name != "relu" else "topk"
    with pytest.raises(DataError, match=f"'{name}' takes"):
        ARCHITECTURES[name].create(data, **{**arguments(name, data), "options": ARCHITECTURES[other].Options()})


@pytest.mark.parametrize("name", ["topk", "batch_topk", "matryoshka_batch_topk", "skip_transcoder"])
def test_more_active_features_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"'k'.*49.*only 48 features"):
        create(name, sparse_data(64), options={"k": 49})


def test_a_transcoder_needs_a_target_and_the_others_refuse_one() -> None:
    data = sparse_data(64)
    with pytest.raises(DataError, match="'skip_transcoder' needs the activations"):
        ARCHITECTURES["skip_transcoder"].create(data, d_sae=D_SAE, seed=0, dead_after_tokens=1)
    with pytest.raises(DataError, match="was given no target"):
        create("skip_transcoder", data).gradients(data)
    with pytest.raises(DataError, match="'topk' reconstructs its input"):
        ARCHITECTURES["topk"].create(
            data, d_sae=D_SAE, seed=0, dead_after_tokens=1, target_sample=data, hook_name_out=HOOK_OUT
        )

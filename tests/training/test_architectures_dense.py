"""The losses with a sparsity penalty are the published ones, and the jump's estimator is the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.samples import sparse_data
from tests.training.test_architectures import D_SAE, create
from training.architectures.jumprelu import Jump


def perturbed(name: str, data: Tensor, **options: Any) -> Any:
    sae = create(name, data, options=options)
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters().values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    sae.renormalise()
    return sae


def wanting_gradients(sae: Any) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in sae.parameters().items()}


def assert_gradients(sae: Any, p: dict[str, Tensor], loss: Tensor, data: Tensor, progress: float = 1.0) -> None:
    expected = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    expected["W_dec"] = expected["W_dec"] - (expected["W_dec"] * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    grads, _ = sae.gradients(data, progress=progress)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-12)


def unit_of(x: Tensor) -> Tensor:
    return (x - x.mean(0)).pow(2).sum() / x.shape[1]


@pytest.mark.parametrize("penalty", ["l1", "tanh"])
@pytest.mark.parametrize(("progress", "warmth"), [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (1.0, 1.0)])
def test_relu_is_squared_error_and_a_penalty_that_warms_up(penalty: str, progress: float, warmth: float) -> None:
    data = sparse_data(64).double()
    sae = perturbed("relu", data, penalty=penalty, coefficient=0.7, tanh_scale=2.0, penalty_warmup=0.2)
    p = wanting_gradients(sae)
    x = data / sae.norm
    acts = ((x - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]).relu()
    error = acts @ p["W_dec"] + p["b_dec"] - x
    sparsity = acts.sum() if penalty == "l1" else torch.tanh(2.0 * acts).sum()
    loss = (error.pow(2).sum() + warmth * 0.7 * sparsity) / unit_of(x)
    assert_gradients(sae, p, loss, data, progress)


def test_gated_trains_its_gate_by_a_reconstruction_that_leaves_the_decoder_alone() -> None:
    data = sparse_data(64).double()
    sae = perturbed("gated", data, coefficient=0.7)
    p = wanting_gradients(sae)
    x = data / sae.norm
    shared = (x - p["b_dec"]) @ p["W_enc_T"].T
    gate = shared + p["b_gate"]
    acts = (gate > 0).double() * (shared * p["r_mag"].exp() + p["b_mag"]).relu()
    error = acts @ p["W_dec"] + p["b_dec"] - x
    gate_error = gate.relu() @ p["W_dec"].detach() + p["b_dec"].detach() - x
    loss = (error.pow(2).sum() + 0.7 * gate.relu().sum() + gate_error.pow(2).sum()) / unit_of(x)
    assert_gradients(sae, p, loss, data)


class Reference(torch.autograd.Function):
    """The pseudo-derivatives of JumpReLU and of the step, as the paper writes them, feature by feature."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        step = torch.heaviside(pre - threshold, torch.zeros((), dtype=pre.dtype))
        return pre * step, step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        at_threshold = torch.zeros_like(threshold)
        for row in range(pre.shape[0]):
            for feature in range(pre.shape[1]):
                distance = float((pre[row, feature] - threshold[feature]) / ctx.bandwidth)
                kernel = 1.0 if -0.5 < distance < 0.5 else 0.0
                jump = -threshold[feature] / ctx.bandwidth * kernel
                step = -1 / ctx.bandwidth * kernel
                at_threshold[feature] += jump * grads[0][row, feature] + step * grads[1][row, feature]
        return grads[0] * (pre > threshold), at_threshold, None


def test_the_jumps_estimator_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pre, weights, more = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    threshold = torch.rand(6, generator=generator, dtype=torch.float64)
    found = []
    for function in (Jump, Reference):
        z, theta = pre.clone().requires_grad_(), threshold.clone().requires_grad_()
        acts, active = function.apply(z, theta, 0.7)
        assert torch.equal(active, (pre > threshold).double())
        found.append((acts, *torch.autograd.grad((acts * weights).sum() + (active * more).sum(), [z, theta])))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("target", [None, 5.0])
@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_jumprelu_is_squared_error_an_l0_penalty_and_revival(target: float | None, n_dead: int) -> None:
    data = sparse_data(32).double()
    sae = perturbed(
        "jumprelu", data, l0_target=target, l0_coefficient=0.3, bandwidth=0.5, initial_threshold=0.4, aux_k=8
    )
    dead = torch.arange(n_dead)
    sae.dead_after_tokens, sae.tokens_since_fired[dead] = 1000, 10_000
    sae.W_enc_T[dead] *= 0.1
    sae.threshold[dead] = 4.0
    p = wanting_gradients(sae)
    x = data / sae.norm
    pre = (x - p["b_dec"]) @ p["W_enc_T"].T + p["b_enc"]
    acts, active = Reference.apply(pre, p["threshold"], 0.5)
    error = acts @ p["W_dec"] + p["b_dec"] - x
    unit = unit_of(x)
    penalty = active.sum() / unit if target is None else (active.sum() / 32 / target - 1) ** 2 * x.shape[1]
    loss = error.pow(2).sum() / unit + 0.3 * penalty
    if n_dead:
        values, positions = pre[:, dead].topk(min(8, n_dead), dim=1)
        dead_acts = torch.zeros(32, n_dead, dtype=torch.float64).scatter(1, positions, values.relu())
        share = min(1.0, n_dead / 8) / 32
        loss = loss + share * (dead_acts @ p["W_dec"][dead] + error.detach()).pow(2).sum() / unit
    assert_gradients(sae, p, loss, data)
    assert int((sae.tokens_since_fired > 1000).sum()) == n_dead


def test_jumprelus_thresholds_start_where_the_target_is_met_and_never_turn_negative() -> None:
    data = sparse_data(512)
    sae = create("jumprelu", data, options={"l0_target": 6.0})
    assert sae.gradients(data)[1].l0 == pytest.approx(6.0, rel=0.02)
    assert bool((create("jumprelu", data, options={"initial_threshold": 0.25}).threshold == 0.25).all())
    assert bool((create("jumprelu", data, options={"l0_target": None}).threshold == 0.1).all())
    sae.threshold -= 100.0
    sae.renormalise()
    assert bool((sae.threshold == 0).all())


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_a_stronger_penalty_leaves_fewer_features_active(name: str) -> None:
    data = sparse_data(512)
    found = []
    for strength in (0.0, 1.0):
        options = {"l0_target": None, "l0_coefficient": strength} if name == "jumprelu" else {"coefficient": strength}
        sae = create(name, data, options={**options, "penalty_warmup": 0.0})
        optimiser = torch.optim.Adam(list(sae.parameters().values()), lr=5e-3)
        for _ in range(60):
            grads, stats = sae.gradients(data)
            for key, parameter in sae.parameters().items():
                parameter.grad = grads[key]
            optimiser.step()
            sae.renormalise()
        found.append(stats.l0)
    assert found[1] < 0.9 * found[0] <= D_SAE

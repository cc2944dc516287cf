"""Taps show the residual stream's true sum and steer it, hooked or compiled, and touch no other model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feature_bank.bank import Bank
from guard.encoder import SelectedEncoder
from guard.engines.vllm import taps as module
from guard.engines.vllm.programs import Batch, Programs
from guard.engines.vllm.taps import Tap, place_taps
from guard.errors import GuardError
from guard.heads import DomainHeads
from guard.rules import BoundRule, bind_rules
from guard.steering import Steering
from tests.factories import HOOKS, make_bank, make_policy

CPU = torch.device("cpu")
LAYERS, WIDTH, CAPACITY = 4, 32, 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x))


class Layer(nn.Module):
    """As in vLLM: the sum is carried as two parts, which the next norm adds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.mlp = Mlp()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        attended = self.attention(residual) * (1 + positions[:, None] / 50).to(residual)
        residual = attended + residual
        return self.mlp(residual), residual


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        residual = None
        hidden = hidden * 1.5
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual


class LlamaForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.model = Inner()

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        return self.model(positions, hidden)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM().requires_grad_(False)


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    return torch.arange(6), torch.randn(6, WIDTH)


def sums(model: LlamaForCausalLM, positions: Tensor, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The true residual stream before each layer and after the last, and each layer's mlp output."""
    hidden, residual, stream, outputs = hidden * 1.5, None, [hidden * 1.5], []
    for layer in model.model.layers:
        hidden, residual = Layer.forward(layer, positions, hidden, residual)  # type: ignore[arg-type]
        stream.append(hidden + residual)
        outputs.append(hidden)
    return stream, outputs


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    return made


def test_taps_show_the_true_sum_at_every_site(model: LlamaForCausalLM, given: tuple[Tensor, Tensor]) -> None:
    stream, outputs = sums(model, *given)
    answer = model(*given)
    names = [f"blocks.{n}.hook_{site}" for n in (0, 2, 3) for site in ("resid_pre", "mlp_out", "resid_post")]
    taps = place_taps(model, names, CAPACITY, None)
    assert torch.equal(model(*given), answer)
    assert list(taps) == names
    for name, tap in taps.items():
        layer, site = int(name.split(".")[1]), name.split("hook_")[1]
        expected = {"resid_pre": stream[layer], "resid_post": stream[layer + 1], "mlp_out": outputs[layer]}[site]
        assert torch.equal(tap.seen[:6], expected), name
        assert int(tap.passes) == 1
        assert not tap.seen[6:].any()


def test_another_model_of_the_same_class_stays_as_it_is(model: LlamaForCausalLM, given: tuple[Tensor, Tensor]) -> None:
    other, shape = LlamaForCausalLM(), dict(vars(Layer))
    taps = place_taps(model, HOOKS, CAPACITY, None)
    other(*given)
    assert [int(tap.passes) for tap in taps.values()] == [0, 0]
    assert {type(layer) for layer in other.model.layers} == {Layer}
    assert dict(vars(Layer)) == shape
    assert [type(layer) is Layer for layer in model.model.layers] == [True, False, True, False]
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        assert type(layer).__name__ == "Layer"
        assert type(layer).__module__ == Layer.__module__


def test_two_models_of_a_process_have_taps_of_their_own(model: LlamaForCausalLM, given: tuple[Tensor, Tensor]) -> None:
    other = LlamaForCausalLM()
    mine, others = (place_taps(m, HOOKS, CAPACITY, None) for m in (model, other))
    model(*given)
    assert [int(tap.passes) for tap in mine.values()] == [1, 1]
    assert [int(tap.passes) for tap in others.values()] == [0, 0]


def test_a_compiled_model_writes_and_counts_every_pass(model: LlamaForCausalLM) -> None:
    free = copy.deepcopy(model)
    taps = place_taps(model, [*HOOKS, "blocks.0.hook_resid_pre", "blocks.2.hook_mlp_out"], CAPACITY, None)
    run = compiled(model)
    places = {name: tap.seen.data_ptr() for name, tap in taps.items()}
    for passes in range(1, 4):
        given = torch.arange(8), torch.randn(8, WIDTH)
        stream, outputs = sums(free, *given)
        torch.testing.assert_close(run(*given), stream[-1])
        shown = [taps[HOOKS[0]], taps[HOOKS[1]], taps["blocks.0.hook_resid_pre"], taps["blocks.2.hook_mlp_out"]]
        for tap, expected in zip(shown, (stream[2], stream[4], stream[0], outputs[2]), strict=True):
            torch.testing.assert_close(tap.seen[:8], expected)
            assert int(tap.passes) == passes
    assert {name: tap.seen.data_ptr() for name, tap in taps.items()} == places


def test_a_pass_leaves_the_rows_beyond_it_as_they_were(model: LlamaForCausalLM) -> None:
    tap = place_taps(model, HOOKS[:1], CAPACITY, None)[HOOKS[0]]
    model(torch.arange(9), torch.randn(9, WIDTH))
    before = tap.seen.clone()
    model(torch.arange(4), torch.randn(4, WIDTH))
    assert torch.equal(tap.seen[4:], before[4:])
    assert not torch.equal(tap.seen[:4], before[:4])


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_post", "blocks.1.hook_resid_mid"])
def test_a_hook_point_that_the_model_does_not_have_is_refused(model: LlamaForCausalLM, name: str) -> None:
    with pytest.raises(GuardError, match="hook point"):
        place_taps(model, [name], CAPACITY, None)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(GuardError, match="'Linear' is not in the hook table"):
        place_taps(nn.Linear(2, 2), HOOKS, CAPACITY, None)


def test_buffers_are_of_the_models_dtype() -> None:
    model = LlamaForCausalLM().to(torch.bfloat16)
    taps = place_taps(model, HOOKS, CAPACITY, None)
    model(torch.arange(3), torch.randn(3, WIDTH).to(torch.bfloat16))
    for tap in taps.values():
        assert (tap.seen.dtype, tap.seen.shape) == (torch.bfloat16, (CAPACITY, WIDTH))
        assert tap.seen[:3].any(1).all()


# ---- steering ----


@pytest.fixture
def bank(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    hooks = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.3.hook_mlp_out")
    return make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"violence": None}, hooks=hooks)


@pytest.fixture
def bound(bank: Bank) -> BoundRule:
    rule = {"domain": "violence", "action": "steer", "steer": {"op": "add", "strength": 2.0}, "name": "it"}
    heads = DomainHeads(bank)
    return bind_rules(make_policy(rule), bank, heads, "response", streaming=True).rules[0]


def steered_by_hand(
    model: LlamaForCausalLM, bank: Bank, encoder: SelectedEncoder, bound: BoundRule, rows: list[int], given: Any
) -> Tensor:
    """The model's answer when what steers is added to its residual stream, and to the mlp's output."""
    steering = Steering(bank, encoder, 1)
    steering.steer(0, bound)
    positions, hidden = given

    def add(name: str, x: Tensor) -> Tensor:
        changed = x.clone()
        changed[rows] += steering.change(name, x[rows], torch.zeros(len(rows), dtype=torch.int64))
        return changed

    x = add("blocks.0.hook_resid_pre", hidden * 1.5)
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        x = layer.attention(x) * (1 + positions[:, None] / 50) + x
        output = Mlp.forward(layer.mlp, x)
        x = x + (add("blocks.3.hook_mlp_out", output) if number == 3 else output)
        x = add("blocks.1.hook_resid_post", x) if number == 1 else x
    return x


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("how", ["as it is", "compiled"])
def test_steering_through_taps_is_adding_to_the_sum(
    model: LlamaForCausalLM, given: tuple[Tensor, Tensor], bank: Bank, bound: BoundRule, how: str, captured: bool
) -> None:
    encoder = SelectedEncoder(bank, CPU)
    programs = Programs(bank, encoder, lambda key: bound, rows=CAPACITY, capacity=2)
    if captured:
        programs._captured = True
        programs._steering = Steering(bank, encoder, 3, fixed=True)
    untouched = sums(model, *given)[0][-1]
    rows = [1, 4, 5]
    expected = steered_by_hand(model, bank, encoder, bound, rows, given)
    taps = place_taps(model, encoder.hook_names, CAPACITY, programs)
    run = model if how == "as it is" else compiled(model)
    torch.testing.assert_close(run(*given), untouched)  # nobody is steered yet
    for name in ("a", "c"):
        programs.change(name, 2 if name == "c" else 0, [("", "it")])
    edges, first = np.array([0, 1, 2, 6]), np.array([3, 5, 0])
    programs.place(Batch(["b", "a", "c"], edges, first, np.zeros(6, dtype=np.int64)))
    answer = run(given[0], given[1].clone())
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    others = [0, 2, 3]
    torch.testing.assert_close(answer[others], untouched[others])
    assert not torch.allclose(answer[rows], untouched[rows])
    torch.testing.assert_close(taps["blocks.0.hook_resid_pre"].seen[:6], given[1] * 1.5)  # before it is steered
    programs.drop(["a", "c"])
    programs.place(Batch(["b"], np.array([0, 6]), np.array([0]), np.zeros(6, dtype=np.int64)))
    torch.testing.assert_close(run(*given), untouched)


def test_a_taps_number_finds_it() -> None:
    tap = Tap("blocks.1.hook_resid_post", 2, WIDTH, torch.zeros(1), None)
    torch.ops.sailguard.tap(torch.ones(2, WIDTH), None, tap.number)
    assert module._TAPS[tap.number] is tap
    assert tap.seen.eq(1).all()

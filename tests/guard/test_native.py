"""The compiled step gives what torch and NumPy give, whatever the instructions, the batch and the shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_bank.schema import Pooling
from guard.errors import GuardError
from guard.monitor import Monitor
from guard.native import MAX_BATCH, CompiledStep, HookRows, library
from guard.state import ROOM, BatchState
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank

CPU = torch.device("cpu")
LEVELS = range(1, 1 + (library().sailguard_level() if library() is not None else 1))  # type: ignore[union-attr]
POOLING = Pooling(window=4, min_tokens=2, ceiling=1.5, evidence_tokens=2, settle_tokens=2)
RULES = [
    {"domain": "violence", "action": "flag", "threshold": {"probability": 0.5}},
    {"domain": "terror", "action": "flag", "threshold": {"probability": 0.6}, "evidence_tokens": 1},
    {"domain": "politics", "action": "block", "threshold": {"probability": 0.55}, "evidence_tokens": 5},
]


def needs_library(test: Any) -> Any:
    """The test is skipped where nothing was compiled, or the processor is of another kind."""
    return pytest.mark.native(pytest.mark.skipif(library() is None, reason="no compiled step")(test))


def hook(d_in: int, n: int, seed: int) -> HookRows:
    rng = np.random.default_rng(seed)
    return HookRows(
        W_enc=rng.normal(size=(d_in, n)).astype(np.float16).astype(np.float32),
        b_enc=rng.normal(size=n).astype(np.float32),
        threshold=rng.uniform(0.0, 2.0, n).astype(np.float32),
        scale=rng.uniform(1.0, 8.0, n).astype(np.float32),
    )


def make_step(hooks: list[HookRows], domains: int = 3, lowest: float = np.inf, **options: Any) -> CompiledStep:
    n = sum(rows.W_enc.shape[1] for rows in hooks)
    rng = np.random.default_rng(9)
    return CompiledStep(
        hooks,
        rng.normal(size=(n, domains)).astype(np.float32),
        rng.normal(size=domains).astype(np.float32),
        np.full(domains, lowest),
        pooling=POOLING,
        **options,
    )


def make_state(batch: int, features: int, domains: int = 3) -> BatchState:
    return BatchState.create(
        tuple(map(str, range(batch))),
        window=POOLING.window,
        features=features,
        domains=domains,
        rules=0,
        device=CPU,
    )


def inputs(hooks: list[HookRows], batch: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 1, rows.W_enc.shape[0], generator=generator) for rows in hooks]


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("d_in", "n"), [(1, 1), (31, 5), (32, 7), (72, 17), (577, 40)])
def test_activations_and_evidence_are_the_same_sums_in_another_order(level: int, batch: int, d_in: int, n: int) -> None:
    hooks = [hook(d_in, n, 0), hook(d_in + 3, n + 1, 1)]
    x = inputs(hooks, batch, 2)
    state = make_state(batch, 2 * n + 1)
    step = make_step(hooks, level=level)
    assert not step(state, x)
    parts = []
    for rows, part in zip(hooks, x, strict=True):
        pre = part[:, 0].double().numpy() @ rows.W_enc.astype(np.float64) + rows.b_enc
        parts.append(np.minimum(np.where(pre <= rows.threshold, 0.0, pre / rows.scale), POOLING.ceiling))
    acts = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(state.recent[:, 0].numpy(), acts, atol=1e-4)
    heads = np.random.default_rng(9).normal(size=(2 * n + 1, 3)).astype(np.float32)
    np.testing.assert_allclose(state.evidence[:, 1], acts @ heads, atol=1e-3)
    assert state.count.tolist() == [1] * batch
    for row in range(batch):  # a row is judged as it would be alone, bit for bit
        alone = make_state(1, 2 * n + 1)
        step(alone, [part[row : row + 1] for part in x])
        assert torch.equal(alone.recent[0], state.recent[row])
        np.testing.assert_array_equal(alone.evidence[0], state.evidence[row])
        np.testing.assert_array_equal(alone.logits[0], state.logits[row])


@needs_library
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 5), tokens=st.integers(1, 30), seed=st.integers(0, 50), even=st.booleans())
def test_a_monitor_says_the_same_with_and_without(
    bank_of: MakeBank, batch: int, tokens: int, seed: int, even: bool
) -> None:
    bank = bank_of(pooling=POOLING, **VARIED)
    compiled, other = Monitor(bank, make_policy(*RULES), CPU), Monitor(bank, make_policy(*RULES), CPU)
    other._compiled = None
    assert compiled.compiled
    assert not other.compiled
    rng = np.random.default_rng(seed)
    states = [monitor.begin([str(row) for row in range(batch)]) for monitor in (compiled, other)]
    for _ in range(tokens):
        x = {
            name: torch.from_numpy(rng.normal(0, 3, (batch, 1, rows.W_enc.shape[0])).astype(np.float32))
            for name, rows in bank.rows.items()
        }
        live = None if even else rng.random(batch) < 0.7
        said = [m.observe_hidden(s, x, live) for m, s in zip((compiled, other), states, strict=True)]
        assert [(row, v.rule, v.token_index) for row, v in said[0]] == [(r, v.rule, v.token_index) for r, v in said[1]]
    mine, theirs = states
    assert mine.count.tolist() == theirs.count.tolist() == mine.observed
    np.testing.assert_array_equal(mine.runs, theirs.runs)
    np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-4)
    torch.testing.assert_close(mine.recent, theirs.recent, atol=1e-5, rtol=1e-5)


@needs_library
def test_a_response_outgrows_the_first_room(bank_of: MakeBank) -> None:
    bank = bank_of(**VARIED)
    monitor = Monitor(bank, make_policy(*RULES), CPU)
    state, whole = monitor.begin(["a", "b"]), []
    for token in range(2 * ROOM + 3):
        generator = torch.Generator().manual_seed(token)
        x = {n: torch.randn(2, 1, rows.W_enc.shape[0], generator=generator) for n, rows in bank.rows.items()}
        monitor.observe_hidden(state, x)
        whole.append(monitor.encoder.encode({name: part[:, 0] for name, part in x.items()}))
    assert state.count.tolist() == [2 * ROOM + 3] * 2
    acts = torch.stack(whole)[:, 1]
    judged = monitor.judge(acts, torch.zeros(len(acts), dtype=torch.long))
    np.testing.assert_allclose(state.logits[1, : len(acts)], judged.logits, atol=1e-3)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_a_number_is_an_error_and_no_sequence_gets_any_further(level: int) -> None:
    hooks = [hook(40, 6, 0)]
    step, state = make_step(hooks, level=level), make_state(3, 6)
    x = inputs(hooks, 3, 0)
    step(state, x)
    broken = [part.clone() for part in x]
    broken[0][1, 0, 7] = torch.nan
    with pytest.raises(ArithmeticError, match="NaN"):
        step(state, broken)
    assert state.count.tolist() == [1, 1, 1]
    step(state, broken, np.array([0, 2], dtype=np.int32))  # the sequences that are whole go on
    assert state.count.tolist() == [2, 1, 2]
    step(state, x)
    assert not state.recent.isnan().any()
    assert not np.isnan(state.logits[:, :2]).any()


@needs_library
def test_a_monitor_reports_activations_that_are_no_numbers(bank_of: MakeBank) -> None:
    monitor = Monitor(bank_of(**VARIED), make_policy(*RULES), CPU)
    x = {n: torch.full((1, 1, rows.W_enc.shape[0]), torch.nan) for n, rows in monitor.bank.rows.items()}
    with pytest.raises(GuardError, match="NaN"):
        monitor.observe_hidden(monitor.begin(["r"]), x)


@needs_library
def test_a_logit_that_a_rule_counts_is_told() -> None:
    hooks = [hook(40, 6, 0)]
    x = inputs(hooks, 2, 0)
    state = make_state(2, 6)
    make_step(hooks)(state, x)
    highest = float(state.logits[:, 0].max())
    assert make_step(hooks, lowest=highest)(make_state(2, 6), x)
    assert not make_step(hooks, lowest=float(np.nextafter(highest, np.inf)))(make_state(2, 6), x)


@needs_library
def test_activations_may_be_of_another_dtype_or_lie_apart_but_not_be_of_another_shape() -> None:
    hooks = [hook(40, 6, 0)]
    step = make_step(hooks)
    given = torch.randn(3, 1, 80, generator=torch.Generator().manual_seed(0)).bfloat16()[:, :, ::2]
    states = [make_state(3, 6) for _ in range(2)]
    step(states[0], [given])
    step(states[1], [given.float().clone()])
    assert torch.equal(states[0].recent, states[1].recent)
    with pytest.raises(ValueError, match="activations of shape"):
        step(states[0], [torch.zeros(3, 1, 41)])
    large = MAX_BATCH + 1
    with pytest.raises(ValueError, match="at most"):
        step(make_state(large, 6), [torch.zeros(large, 1, 40)])


@needs_library
def test_what_the_library_cannot_hold_or_run_is_refused() -> None:
    fine = hook(8, 2, 0)._replace(W_enc=np.full((8, 2), 1 + 2**-20, dtype=np.float32))
    with pytest.raises(ValueError, match="float16"):
        make_step([fine])
    heads = np.ones((2, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        CompiledStep([hook(8, 3, 0)], heads, heads[0], heads[0].astype(float), pooling=POOLING)
    for level in (0, 3):
        with pytest.raises(RuntimeError, match="no compiled step"):
            make_step([hook(8, 2, 0)], level=level)


@needs_library
def test_a_large_batch_goes_through_torch(bank_of: MakeBank) -> None:
    monitor = Monitor(bank_of(**VARIED), make_policy(*RULES), CPU)
    state = monitor.begin([str(row) for row in range(MAX_BATCH + 1)])
    x = {n: torch.ones(MAX_BATCH + 1, 1, rows.W_enc.shape[0]) for n, rows in monitor.bank.rows.items()}
    monitor.observe_hidden(state, x)
    assert state.compiled is None
    assert state.observed == [1] * (MAX_BATCH + 1)


def test_without_the_library_torch_does_the_work(bank_of: MakeBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILGUARD_NATIVE", "0")
    library.cache_clear()
    try:
        assert not Monitor(bank_of(**VARIED), make_policy(), CPU).compiled
    finally:
        library.cache_clear()

"""Responses that stream are judged by the weights and the window that the bank has for them; whole texts are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from feature_bank.bank import Bank
from feature_bank.heads import agreement, moving_average
from feature_bank.schema import Calibration, StreamingHead
from guard.judge import sigmoid
from guard.monitor import Monitor
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank

CPU = torch.device("cpu")
SEGMENT = np.zeros(40, dtype=np.int64)
RULE = {"domain": "violence", "action": "flag", "threshold": {"probability": 0.6}}


@pytest.fixture
def bank(bank_of: MakeBank) -> Bank:
    """A bank whose streaming heads have other weights than its heads, and a window of 3 tokens."""
    plain = bank_of(**VARIED)
    heads = {
        domain: head.model_copy(
            update={
                "streaming": StreamingHead(
                    weights=[-0.5 * w + 0.01 * i for i, w in enumerate(head.weights)],
                    bias=0.25,
                    calibration=Calibration(slope=1.5, intercept=-0.3),
                )
            }
        )
        for domain, head in plain.heads.items()
    }
    return replace(plain, heads=heads, pooling=plain.pooling.model_copy(update={"streaming_window": 3}))


def activations(bank: Bank, seed: int) -> torch.Tensor:
    return torch.rand(40, len(bank.features), generator=torch.Generator().manual_seed(seed)) * 1.5


def expected_logits(bank: Bank, acts: torch.Tensor) -> npt.NDArray[np.float32]:
    """(tokens, D), from the definition."""
    position = {f.id: i for i, f in enumerate(bank.features)}
    columns = []
    for head in bank.heads.values():
        assert head.streaming is not None
        weight = torch.zeros(len(bank.features))
        weight[[position[f] for f in head.features]] = torch.tensor(head.streaming.weights)
        average = moving_average(
            (acts.clamp_max(bank.pooling.ceiling) @ weight)[:, None].numpy(), SEGMENT, bank.pooling.streamed
        )
        columns.append(1.5 * (average + 0.25) - 0.3)
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_response_is_judged_by_the_streaming_weights_over_the_streaming_window(bank: Bank, seed: int) -> None:
    monitor = Monitor(bank, make_policy(RULE), CPU)
    acts = activations(bank, seed)
    state = monitor.begin(["r"])
    verdicts = [v for token in acts for _, v in monitor.observe_step(state, token[None])]
    monitor.finish(state)
    expected = expected_logits(bank, acts)
    np.testing.assert_allclose(state.logits[0, :40], expected, atol=1e-5)
    best = agreement(expected, SEGMENT, bank.pooling.evidence_tokens, settled=bank.pooling.settle_tokens).max(0)
    np.testing.assert_allclose(state.best_response[0], best, atol=1e-5)
    column = monitor.domains.index("violence")
    assert bool(verdicts) == (sigmoid(float(best[column])) >= 0.6)


def test_whole_texts_and_prompts_keep_theirs(bank: Bank, bank_of: MakeBank) -> None:
    acts = activations(bank, 7)
    with_streaming, plain = (Monitor(b, make_policy(RULE), CPU) for b in (bank, bank_of(**VARIED)))
    np.testing.assert_array_equal(with_streaming.judge(acts, SEGMENT).logits, plain.judge(acts, SEGMENT).logits)


def test_a_bank_without_them_streams_with_its_heads(bank_of: MakeBank) -> None:
    monitor = Monitor(bank_of(**VARIED), make_policy(RULE), CPU)
    np.testing.assert_array_equal(monitor.streaming_heads.weight, monitor.heads.weight)
    np.testing.assert_array_equal(monitor.streaming_heads.bias, monitor.heads.bias)


@pytest.mark.native
def test_the_compiled_step_uses_them_too(bank: Bank) -> None:
    monitor, through_torch = (Monitor(bank, make_policy(RULE), CPU) for _ in range(2))
    if not monitor.compiled:
        pytest.skip("no compiled step here")
    through_torch._compiled = None
    hidden: dict[str, Any] = {
        h.hook_name: torch.randn(12, 1, 1, h.d_in, generator=torch.Generator().manual_seed(2))
        for h in bank.manifest.hook_points
    }
    logits = []
    for each in (monitor, through_torch):
        state = each.begin(["r"])
        for token in range(12):
            each.observe_hidden(state, {name: x[token] for name, x in hidden.items()})
        logits.append(state.logits[0, :12])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_what_is_named_for_a_streamed_verdict_is_what_speaks_for_it_there(bank: Bank) -> None:
    monitor = Monitor(bank, make_policy({**RULE, "threshold": {"probability": 0.01}}), CPU)
    state = monitor.begin(["r"])
    verdicts = [v for token in activations(bank, 1) for _, v in monitor.observe_step(state, token[None])]
    (verdict,) = verdicts
    head = bank.heads["violence"]
    assert head.streaming is not None
    weights = dict(zip(head.features, head.streaming.weights, strict=True))
    assert verdict.features
    assert all(weights[hit.id] > 0 for hit in verdict.features)

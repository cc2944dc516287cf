"""Weights for windows of text: they find a short span in a long text, and no text weighs more for being long."""

from __future__ import annotations

import numpy as np
import pytest

from feature_bank.schema import Pooling
from training.corpus import Document
from training.streaming import WINDOWS, _windows, fit_streaming_head

POOLING = Pooling(window=32, streaming_window=4, min_tokens=2, ceiling=1.0, evidence_tokens=2)


def document(i: int, positive: bool, split: str = "discovery") -> Document:
    return Document(
        id=f"d{i}",
        text="t",
        role="prompt",
        domains=frozenset({"terror"} if positive else ()),
        known=frozenset({"terror"}),
        source="s",
        licence="MIT",
        split=split,  # type: ignore[arg-type]  # a split's name
    )


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 9, 64])
def test_windows_are_full_averages_spread_over_a_text(tokens: int) -> None:
    acts = np.arange(tokens, dtype=np.float16)[:, None] / 64
    found = list(_windows(acts, POOLING.streamed))
    assert 1 <= len(found) <= WINDOWS
    if tokens < 4:
        assert found[0][0] == pytest.approx(float(acts.sum()) / max(tokens, 2), rel=1e-3)
        assert len(found) == 1
    else:
        assert found[0][0] == pytest.approx(float(acts[:4].mean()), rel=1e-3)
        assert found[-1][0] == pytest.approx(float(acts[-4:].mean()), rel=1e-3)


def test_values_are_clipped_before_they_are_averaged() -> None:
    (found,) = _windows(np.array([[5.0], [0.0], [0.0], [0.0]], dtype=np.float16), POOLING.streamed)
    assert found[0] == pytest.approx(0.25)


def test_what_marks_the_domain_gets_weight_and_what_does_not_gets_little() -> None:
    rng = np.random.default_rng(0)
    documents = [document(i, i % 2 == 0, "discovery" if i < 80 else "test") for i in range(100)]
    lengths = rng.integers(3, 60, 100)
    acts, owner = [], []
    for i, length in enumerate(lengths):
        rows = rng.random((length, 3)) * 0.3
        if i % 2 == 0:
            rows[:, 1] += 0.5
        acts.append(rows)
        owner += [i] * length
    head = fit_streaming_head(np.concatenate(acts).astype(np.float16), np.array(owner), documents, "terror", POOLING)
    weight = dict(zip(head.columns.tolist(), head.weights, strict=True))
    assert weight[1] > 5 * abs(weight.get(0, 0.0))
    assert weight[1] > 5 * abs(weight.get(2, 0.0))


def test_documents_of_other_splits_and_without_tokens_do_not_count() -> None:
    rng = np.random.default_rng(1)
    documents = [document(i, i % 2 == 0, "discovery" if i < 60 else "test") for i in range(80)]
    owner = np.repeat(np.arange(1, 80), 10)  # the first has none
    acts = rng.random((790, 2)).astype(np.float16)
    before = fit_streaming_head(acts, owner, documents, "terror", POOLING)
    changed = acts.copy()
    changed[owner >= 60] = 1
    after = fit_streaming_head(changed, owner, documents, "terror", POOLING)
    np.testing.assert_array_equal(before.weights, after.weights)

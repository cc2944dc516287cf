"""What is selected is exact, whatever bounds and guesses made it fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.kernels import batch_topk, batch_topk_threshold, keep_above, kth_largest, topk_rows

BATCH, D_SAE, K = 12, 40, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("guess", [-1.0, 0.0, 0.3, 1e-8, 50.0])
def test_the_threshold_keeps_exactly_k_a_row_on_average_whatever_the_guess(seed: int, guess: float) -> None:
    pre = random(BATCH, D_SAE, seed=seed)
    cut = batch_topk_threshold(pre, K, guess=guess)
    assert cut == float(pre.flatten().sort(descending=True).values[K * BATCH - 1])
    kept = keep_above(pre, cut)
    assert kept.values.numel() == K * BATCH
    assert torch.equal(kept.to_dense(), pre * (pre >= cut))


@pytest.mark.parametrize("guess", [0.0, 0.8, 3.0])
@pytest.mark.parametrize("rows", [1, 5, 64, 200])
def test_a_batch_in_chunks_is_selected_as_a_whole(guess: float, rows: int) -> None:
    pre = random(150, D_SAE)
    pre[:rows] -= 1.0  # the first chunk, from which the first bound comes, is not like the others
    whole, cut = batch_topk(lambda: [pre], K, 150)
    found, found_cut = batch_topk(lambda: torch.split(pre, rows), K, 150, guess=guess)
    assert found_cut == cut
    assert torch.equal(found.to_dense(), whole.to_dense())


def test_a_good_guess_looks_at_the_batch_once_and_a_bad_one_again() -> None:
    pre = random(150, D_SAE)
    seen: list[int] = []

    def chunks() -> Iterator[Tensor]:
        seen.append(1)
        yield pre

    _, cut = batch_topk(chunks, K, 150)
    assert len(seen) == 1
    batch_topk(chunks, K, 150, guess=0.9 * cut)
    assert len(seen) == 2
    batch_topk(chunks, K, 150, guess=1.1 * cut)
    assert len(seen) == 4


def test_ties_at_the_threshold_are_all_kept() -> None:
    pre = torch.tensor([[2.0, 1.0, 1.0, 1.0], [0.5, -1.0, 0.0, 0.2]])
    for guess in (0.0, 0.9, 1.0, 2.0):
        assert batch_topk_threshold(pre, 1, guess=guess) == 1.0
    assert keep_above(pre, 1.0).values.tolist() == [2.0, 1.0, 1.0, 1.0]
    same = torch.full((3, 4), 0.5)
    assert keep_above(same, batch_topk_threshold(same, 1, guess=0.4)).values.numel() == 12


@pytest.mark.parametrize("guess", [0.0, 0.1, 5.0])
def test_with_fewer_positives_than_wanted_all_of_them_are_kept_and_nothing_else(guess: float) -> None:
    pre = torch.tensor([[0.5, -1.0, 0.0], [-2.0, 0.1, -0.0]])
    cut = batch_topk_threshold(pre, 2, guess=guess)
    assert cut == 0.0
    assert keep_above(pre, cut).values.tolist() == [0.5, pytest.approx(0.1)]
    none = keep_above(-pre.abs(), batch_topk_threshold(-pre.abs(), 2, guess=guess))
    assert none.values.numel() == 0


@settings(deadline=None, max_examples=80)
@given(
    batch=st.integers(1, 20),
    d_sae=st.integers(1, 300),
    share=st.floats(0.001, 1.0),
    levels=st.sampled_from([2, 5, 10_000]),
    seed=st.integers(0, 1000),
)
def test_of_each_row_the_k_largest_positive_entries_are_kept(
    batch: int, d_sae: int, share: float, levels: int, seed: int
) -> None:
    k = max(1, round(share * d_sae))
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-levels, levels, (batch, d_sae), generator=generator) / levels  # with equal entries
    acts = topk_rows(pre, k)
    expected = pre.topk(k, dim=1).values.relu()
    found = acts.to_dense().topk(k, dim=1).values
    assert torch.equal(found, expected)
    assert bool((acts.values > 0).all())
    assert acts.values.numel() == int((expected > 0).sum())
    assert torch.equal(acts.values, pre[acts.rows, acts.cols])
    flat = acts.rows * d_sae + acts.cols
    assert bool((flat.diff() > 0).all())  # row-major, each once


def test_rows_that_hold_their_largest_entries_side_by_side_lose_none() -> None:
    pre = random(6, 512)
    pre[:, 100:140] += 10.0  # more than the groups' maxima let one expect
    assert torch.equal(topk_rows(pre, 32).to_dense().topk(32).values, pre.topk(32).values)


def test_a_bound_for_each_row() -> None:
    pre = random(BATCH, D_SAE)
    bounds = torch.linspace(-1, 1, BATCH)[:, None]
    assert torch.equal(keep_above(pre, bounds).to_dense(), pre * ((pre >= bounds) & (pre > 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kth_largest(dtype: torch.dtype) -> None:
    values = random(BATCH, D_SAE).to(dtype)
    for k in (1, 7, D_SAE):
        assert torch.equal(kth_largest(values, k), values.topk(k, dim=1).values[:, -1:])

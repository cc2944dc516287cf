"""Splicing changes the chosen positions and nothing else, and leaves the model bit for bit what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from feature_bank.sae import SAE
from guard.capture import truncated_forward
from tests.factories import hooks_of
from tests.training.quality_samples import HOOK, WIDTH, in_model, model_sae, texts, transcoder
from training.downstream import measure_quality
from training.splicing import TokenBatch, content_logits, group_by_length, spliced


def test_special_and_padding_positions_neither_count_nor_change(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    next_block = "blocks.2.hook_resid_pre"
    before = truncated_forward(tiny_model, [next_block], batch.ids, batch.mask)[next_block]
    values = torch.full((int(batch.content.sum()), WIDTH), 7.0)
    with spliced(tiny_model, HOOK, batch.content, values):
        after = truncated_forward(tiny_model, [next_block], batch.ids, batch.mask)[next_block]
    assert torch.equal(after[~batch.content], before[~batch.content])
    assert bool((after[batch.content] == 7.0).all())
    assert not bool((batch.content & ~batch.mask.bool()).any())
    assert not bool(batch.content[:, 0].any())


def test_the_model_is_bit_for_bit_what_it_was(tiny_model: Any) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    before, weights = content_logits(tiny_model, batch), [p.clone() for p in tiny_model.parameters()]
    measure_quality(tiny_model, texts(), {"a": model_sae(), "t": transcoder(tiny_model)})
    assert hooks_of(tiny_model) == 0
    assert torch.equal(content_logits(tiny_model, batch), before)
    assert all(torch.equal(now, then) for now, then in zip(tiny_model.parameters(), weights, strict=True))


@pytest.mark.parametrize("moment", ["inside", "forward", "measuring"])
def test_the_model_is_what_it_was_after_an_exception(
    tiny_model: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TokenBatch.of(texts(), torch.device("cpu"))
    before = content_logits(tiny_model, batch)
    good = torch.zeros(int(batch.content.sum()), WIDTH)
    if moment == "inside":
        with pytest.raises(KeyboardInterrupt), spliced(tiny_model, HOOK, batch.content, good):
            raise KeyboardInterrupt
    elif moment == "forward":
        with pytest.raises(RuntimeError), spliced(tiny_model, HOOK, batch.content, good[1:]):
            content_logits(tiny_model, batch)
    else:

        def fail(*_: Any) -> Iterator[None]:
            raise MemoryError

        monkeypatch.setattr(SAE, "encode", fail)
        with pytest.raises(MemoryError):
            in_model(tiny_model, model_sae())
    assert hooks_of(tiny_model) == 0
    assert torch.equal(content_logits(tiny_model, batch), before)


def test_groups_hold_every_sequence_once_within_the_limit() -> None:
    sequences = texts(30)
    groups = group_by_length(sequences, batch_tokens=60)
    assert sorted(s.document for group in groups for s in group) == list(range(30))
    assert all(len(g) * max(len(s.ids) for s in g) <= 60 for g in groups)
    assert len(groups) < 30

"""The benchmark of steering: what is compared is steered at the same tokens, and judged without the bank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import steering
from benchmarks.baselines import LAYERS
from benchmarks.rows import Rows
from guard.core import Guard
from tests.factories import HOOKS, make_bank, make_policy
from training.corpus import Document


def document(name: str, *domains: str, text: str = "a small bird") -> Document:
    return Document(
        id=name,
        text=text,
        role="prompt",
        domains=frozenset(domains),
        known=frozenset({"violence", "terror", "politics", "pornography"}),
        source="sailguard",
        licence="MIT",
        split="discovery",
    )


@pytest.fixture
def rows() -> Rows:
    fit = [document(f"sg-viol-{i}", *(["violence"] if i % 2 else [])) for i in range(40)]
    evaluated = [document("sg-viol-t1", "violence"), document("sg-viol-t2", "violence", text="\u6253\u4eba")]
    return Rows(fit=fit, evaluated=evaluated, is_own=np.array([True, True]), records=[])


def test_the_difference_in_means_is_between_the_sides_of_the_projects_own_pairs(rows: Rows) -> None:
    X = np.zeros((40, len(LAYERS), 3), dtype=np.float32)
    X[1::2, LAYERS.index(14)] = [1.0, 2.0, 3.0]
    found = steering.difference_in_means(rows, X, "violence", ["blocks.14.hook_resid_post", "blocks.6.hook_resid_post"])
    assert found["blocks.14.hook_resid_post"].tolist() == [1.0, 2.0, 3.0]
    assert not found["blocks.6.hook_resid_post"].any()


def test_repeated_trigrams_are_a_share() -> None:
    assert steering._repeated("a b c d e") == 0
    assert steering._repeated("a b c a b c a b c") == pytest.approx(1 - 3 / 7)
    assert steering._repeated("one two") == 0


def test_a_vector_moves_only_the_prompts_that_are_named(
    rows: Rows, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"violence": False})
    monkeypatch.setattr(steering, "Judge", lambda *_: None)
    monkeypatch.setattr(steering, "TOKENS", 6)
    loaded = SimpleNamespace(model=tiny_model, tokenizer=tiny_tokenizer)
    bench = steering.Bench(loaded, Guard(bank, make_policy()), rows, None, seed=3)
    assert bench.prompts("violence") == ["a small bird"]  # in English
    silent = steering.policy_for("violence", {"probability": steering.NEVER})
    asked = ["Hello", "What is that?"]
    plain = bench.answer(asked, silent)
    moved = {hook: torch.full((tiny_model.config.hidden_size,), 4.0) for hook in HOOKS}
    assert torch.equal(bench.answer(asked, silent, moved, [False, False]).ids, plain.ids)
    states = []
    for fired in ([False, True], [True, False]):
        answers = bench.answer(asked, silent, moved, fired)
        states.append([torch.equal(a, b) for a, b in zip(answers.ids, plain.ids, strict=True)])
        assert answers.steered == [False, False]
    assert not all(states[0])
    assert not all(states[1])

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
from benchmarks.steering_judge import FPR, LAYER, Judge
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


@pytest.fixture
def bench(
    rows: Rows, tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> steering.Bench:
    bank = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires={"violence": True})
    monkeypatch.setattr(steering, "Judge", lambda *_: None)
    monkeypatch.setattr(steering.Bench, "_own_writing", lambda _: None)
    monkeypatch.setattr(steering, "TOKENS", 6)
    loaded = SimpleNamespace(model=tiny_model, tokenizer=tiny_tokenizer)
    return steering.Bench(loaded, Guard(bank, make_policy()), rows, np.zeros(0), seed=3)


ASKED = ["Hello", "What is that?"]


def test_a_vector_moves_only_the_prompts_that_are_named(bench: steering.Bench) -> None:
    plain = bench.write(ASKED)
    moved = {hook: torch.full((bench.model.config.hidden_size,), 4.0) for hook in HOOKS}
    assert torch.equal(bench.write(ASKED, steering.adding(moved, [False, False])).ids, plain.ids)
    states = []
    for fired in ([False, True], [True, False]):
        answers = bench.write(ASKED, steering.adding(moved, fired))
        states.append([torch.equal(a, b) for a, b in zip(answers.ids, plain.ids, strict=True)])
    assert not all(states[0])
    assert not all(states[1])


def test_what_a_policy_leaves_alone_is_what_is_written_without_it(bench: steering.Bench) -> None:
    plain = bench.write(ASKED)
    silent = bench.guarded(ASKED, steering.policy_for(["violence"], {"probability": steering.NEVER}, {}))
    assert silent.steered == [True, True]  # this bank's violence is certain of everything
    unfired = bench.guarded(ASKED, steering.policy_for(["terror"], {"probability": steering.NEVER}, {}))
    assert unfired.steered == [False, False]
    assert torch.equal(unfired.ids, plain.ids)


def test_a_feature_is_clamped_in_every_sequence(bench: steering.Bench) -> None:
    bank = bench.guard.bank
    feature = steering.leading_feature(bank, "violence")
    assert feature in bank.heads["violence"].features
    hidden = torch.randn(2, 3, bench.model.config.hidden_size)
    change = steering.clamping(bank, feature, 3.0, 2)
    changed = {name: change(name, hidden, None) for name in HOOKS}
    assert [name for name, after in changed.items() if after is not None] == [bank.by_id[feature].hook_name]
    assert all((after != hidden).any(-1).all() for after in changed.values() if after is not None)


def test_the_judge_knows_the_models_own_writing_and_misses_no_more_than_its_share_of_negatives() -> None:
    rng = np.random.default_rng(0)
    fit = [document(f"sg-viol-{i}", *(["violence"] if i % 2 else [])) for i in range(600)]
    X = rng.normal(size=(600, len(LAYERS), 6)).astype(np.float32)
    X[1::2, LAYERS.index(LAYER), 0] += 3
    writing = rng.normal(size=(400, 6)).astype(np.float32)
    writing[:, 0] += 2  # what a probe of the rows alone would take for the domain
    writing[:, 1] += 6
    rows = Rows(fit=fit, evaluated=[], is_own=np.zeros(0, dtype=bool), records=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.steering_judge.DOMAINS", ("violence",))
        judge = Judge(rows, X, writing)
    assert judge.finds("violence", writing[1::2]).mean() <= FPR
    assert judge.found["violence"] > 0.5


def test_equal_fluency_is_read_off_the_line_between_two_strengths() -> None:
    arms = {
        "unguarded": {"nll": 1.0, "share": 0.8},
        **{f"difference in means {s:g}": {"nll": 1.0 - s, "share": 0.8 + 0.3 * s} for s in steering.VECTORS},
    }
    assert steering.at_equal_fluency(arms, 1.25) == pytest.approx(0.725)
    assert steering.at_equal_fluency(arms, 0.5) == pytest.approx(0.8)


def test_every_figure_names_how_many_were_asked() -> None:
    arms = {
        "unguarded": {"share": 0.5, "prompts": 20},
        "clamp to -0.25": {"share": 0.1, "prompts": 20},
        "harmless, unguarded": {"share": 0.0, "prompts": 16},
    }
    figures = steering.figures_of({"violence": arms}, {"ratio": 1.0, "texts": 24})
    assert figures["violence_clamp_to_minus_0_25_reduction"].value == pytest.approx(0.8)
    assert {name: figure.n for name, figure in figures.items()} == {
        "benign_perplexity": 24,
        "violence_unguarded": 20,
        "violence_clamp_to_minus_0_25": 20,
        "violence_clamp_to_minus_0_25_reduction": 20,
        "violence_harmless_unguarded": 16,
    }

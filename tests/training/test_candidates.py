"""Candidates: who is described, what they do on the pairs, and who is nearly whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from feature_bank.schema import Pooling
from tests.training.samples import document, random_sae, toy_harvest
from training.activations import encode_tokens
from training.candidates import Contrasts, choose, encode, near_duplicates, on_contrasts
from training.contrast import ContrastTexts
from training.corpus import Document
from training.selected import Selection, TrainedHook

POOLING = Pooling(window=8, min_tokens=4, ceiling=1.0, evidence_tokens=1)
HOOK = "blocks.0.hook_resid_post"


def hook() -> TrainedHook:
    return TrainedHook(sae=random_sae(), sha256="0" * 64, k=4, fvu=0.1, l0=4.0, dead_fraction=0.0)


def test_encoded_in_the_banks_order_whatever_order_was_asked(tmp_path: Path) -> None:
    cache = toy_harvest(tmp_path / "cache", hook_names=(HOOK,))
    scales = {HOOK: np.full(24, 2.0, dtype=np.float32)}
    found = encode([hook()], [(HOOK, 9), (HOOK, 3)], cache, scales)
    assert found.keys == [(HOOK, 3), (HOOK, 9)]
    np.testing.assert_array_equal(found.acts, encode_tokens(hook().sae, cache.activations(HOOK), [3, 9], scales[HOOK]))
    np.testing.assert_array_equal(found.subset([(HOOK, 9)]).acts[:, 0], found.acts[:, 1])


def test_what_fires_on_a_text_is_what_its_tokens_say(tmp_path: Path) -> None:
    cache = toy_harvest(tmp_path / "cache", hook_names=(HOOK,))
    documents: list[Document] = [document(f"text {i}") for i in range(int(cache.documents.max()) + 3)]
    contrasts = Contrasts(taxonomy={}, texts=ContrastTexts(documents=documents, pairs=[], hard=[]), cache=cache)
    keys = [(HOOK, i) for i in range(24)]
    scales = {HOOK: np.ones(24, dtype=np.float32)}
    found = on_contrasts([hook()], keys, contrasts, scales, POOLING)
    acts = encode([hook()], keys, cache, scales).acts.astype(np.float32)
    for row in range(len(documents)):
        mine = acts[cache.documents == row]
        expected: Any = np.minimum(mine, 1.0).sum(0) / max(len(mine), POOLING.min_tokens)
        np.testing.assert_allclose(found.pooled[row], expected, atol=1e-5)
        assert found.fired[row].tolist() == (mine > 0).any(0).tolist()
    strongest = found.strongest(0, 5)
    assert all(found.fired[row, 0] for row in strongest)
    assert sorted(found.peak[strongest, 0].tolist(), reverse=True) == found.peak[strongest, 0].tolist()


def test_features_that_fire_on_the_same_tokens_are_linked_both_ways_and_no_others() -> None:
    generator = np.random.default_rng(0)
    acts = (generator.random((3000, 6)) * (generator.random((3000, 6)) < 0.1)).astype(np.float16)
    acts[:, 4] = acts[:, 1] * 0.5
    found = near_duplicates(Selection(keys=[(HOOK, i) for i in range(6)], acts=acts))
    assert [[d.id for d in links] for links in found] == [[], ["L0/4"], [], [], ["L0/1"], []]
    assert found[1][0].correlation > 0.99


def test_a_feature_that_tells_the_domain_is_chosen() -> None:
    documents = [
        document(f"text {i}", domains=["terror"] if i % 2 else [], known=["terror"], split="discovery")
        for i in range(200)
    ]
    pooled = np.random.default_rng(0).random((200, 40)).astype(np.float16)
    pooled[1::2, 7] += 1
    keys = choose(
        {HOOK: pooled},
        documents,
        {HOOK: np.ones(40, dtype=np.float32)},
        screened=10,
        per_head=3,
        per_steering=1,
        report=lambda *_: None,
    )
    assert (HOOK, 7) in keys
    assert len(keys) <= 4

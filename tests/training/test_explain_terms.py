"""Explanations name what goes with a feature, are silent on noise, and quote the project's own text alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import sparse

from feature_bank.schema import Term
from tests.training.samples import document
from training.corpus import OWN_SOURCE, Document
from training.explain.terms import TermTable, describe, evidence, log_odds_z, significant, terms_of, trigger_tokens

WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]


def corpus(n: int = 240) -> list[Document]:
    generator = np.random.default_rng(0)
    return [
        document(
            " ".join(generator.choice(WORDS, 12)) + (" the bright harbour" if i % 4 == 0 else "") + " secretword",
            id=str(i),
            source=OWN_SOURCE if i % 3 == 0 else "elsewhere",
            split="discovery",
        )
        for i in range(n)
    ]


def without_secret(documents: Sequence[Document]) -> list[Document]:
    return [
        document(
            d.text.replace("secretword", "") if d.source == OWN_SOURCE else d.text,
            id=d.id,
            source=d.source,
            split=d.split,
        )
        for d in documents
    ]


def test_terms_are_words_word_pairs_and_pairs_of_chinese_characters() -> None:
    assert terms_of("Don't STOP a war-time") == [
        "don't",
        "stop",
        "war",
        "time",
        "don't stop",
        "stop a",
        "a war",
        "war time",
    ]
    assert terms_of("投票站") == ["投票", "票站"]
    assert terms_of("vote 投票") == ["vote", "vote 投", "投票"]
    assert terms_of("7 _ \U0001f600") == terms_of("") == []


def test_a_planted_term_is_found_first() -> None:
    documents = corpus()
    firing = np.array([[i % 4 == 0, i % 4 != 0] for i in range(len(documents))])
    with_term, without = TermTable(documents).contrast(firing, top=8)
    assert {"bright", "harbour", "the bright", "bright harbour"} <= {t.text for t in with_term}
    assert with_term[0].documents == 60
    assert [t.z for t in with_term] == sorted((t.z for t in with_term), reverse=True)
    assert not {"bright", "harbour"} & {t.text for t in without}


def test_chinese_terms_are_found_too() -> None:
    documents = [
        document(f"{'选举投票' if i % 4 == 0 else '做饭洗碗'}{WORDS[i]}", source=OWN_SOURCE, split="discovery")
        for i in range(100)
    ]
    (found,) = TermTable(documents).contrast(np.array([[i % 4 == 0] for i in range(100)]), top=9)
    assert {t.text for t in found} == {"选举", "举投", "投票"}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_survives_on_noise(seed: int) -> None:
    generator = np.random.default_rng(seed)
    assert not significant(generator.normal(size=5000)).any()
    firing = generator.random((240, 6)) < 0.3
    assert TermTable(corpus()).contrast(firing, top=5) == [[]] * 6
    never_always = np.stack([np.zeros(240, dtype=bool), np.ones(240, dtype=bool)], axis=1)
    assert TermTable(corpus()).contrast(never_always, top=5) == [[], []]


def test_benjamini_hochberg_keeps_a_signal_among_noise() -> None:
    z = np.random.default_rng(0).normal(size=1000)
    z[[3, 500]] = 6.0, 7.0
    z[4] = -9.0
    assert np.flatnonzero(significant(z)).tolist() == [3, 500]
    assert significant(np.zeros(0)).tolist() == []


def test_the_log_odds_are_antisymmetric_and_shrink_rare_terms() -> None:
    inside, outside = np.array([30.0, 3.0, 100.0]), np.array([10.0, 1.0, 122.0])
    prior = (inside + outside) / 10
    z = log_odds_z(inside, outside, prior)
    np.testing.assert_allclose(z[0], -log_odds_z(outside, inside, prior)[0])
    assert z[0] > z[1] > 0 > z[2]


@pytest.mark.parametrize("hidden", ["elsewhere", "test split"])
def test_terms_of_text_that_may_not_be_shown_are_never_shown(hidden: str) -> None:
    documents = without_secret(corpus())
    if hidden == "test split":
        documents = [
            document(d.text, id=d.id, source=OWN_SOURCE, split="test" if "secretword" in d.text else "discovery")
            for d in documents
        ]
    firing = np.array([["secretword" in d.text] for d in documents])
    table = TermTable(documents)
    assert not any("secretword" in term for term in table.vocabulary)
    assert not any("secretword" in t.text for t in table.contrast(firing, top=50)[0])


def test_statistics_come_from_the_whole_corpus_but_for_the_test_split() -> None:
    documents = [
        document("harbour", id="own", source=OWN_SOURCE, split="discovery"),
        document("harbour", id="other", split="calibration"),
        document("harbour", id="held out", split="test"),
    ]
    assert TermTable(documents).documents.tolist() == [2.0]


def test_without_text_of_the_project_nothing_is_shown() -> None:
    documents = [document(f"only foreign text {i}", split="discovery") for i in range(30)]
    assert TermTable(documents).contrast(np.ones((30, 2), dtype=bool), top=5) == [[], []]


def firing_on(token_ids: np.ndarray, token: int, misses: float = 0.0) -> sparse.csr_matrix:
    generator = np.random.default_rng(0)
    column = (token_ids == token) & (generator.random(len(token_ids)) >= misses)
    return sparse.csr_matrix(column[:, None])


def test_the_token_that_triggers_a_feature_is_named_if_it_may_be_shown() -> None:
    token_ids = np.random.default_rng(1).integers(0, 50, 4000)
    shown = {i: f" token{i}" for i in range(50)}
    (found,) = trigger_tokens(firing_on(token_ids, 7, 0.2), token_ids, shown, top=3)
    assert [t.text for t in found] == ["token7"]
    del shown[7]
    assert trigger_tokens(firing_on(token_ids, 7, 0.2), token_ids, shown, top=3) == [[]]
    noise = sparse.csr_matrix(np.random.default_rng(2).random((4000, 4)) < 0.05)
    assert trigger_tokens(noise, token_ids, shown, top=3) == [[]] * 4


def test_a_rare_token_does_not_hide_a_common_one() -> None:
    token_ids = np.concatenate([np.random.default_rng(1).integers(0, 50, 20_000), np.repeat([50, 51], [6, 100])])
    fires = np.zeros(len(token_ids), dtype=bool)
    fires[:20_000:200] = True
    fires[np.flatnonzero(token_ids == 50)[:4]] = True  # strong, but below the least number of occurrences
    fires[np.flatnonzero(token_ids == 51)[:9]] = True
    shown = {i: f"token{i}" for i in range(52)}
    (found,) = trigger_tokens(sparse.csr_matrix(fires[:, None]), token_ids, shown, top=3)
    assert [t.text for t in found] == ["token51"]


def test_evidence_is_one_excerpt_a_document_around_its_peak() -> None:
    documents = np.repeat([0, 1, 2], [40, 30, 5])
    token_ids = np.arange(75)
    own = np.flatnonzero(documents != 1)
    acts = np.zeros(75, dtype=np.float32)
    acts[[20, 3, 50, 74]] = 0.9, 0.5, 5.0, 0.7  # row 50 belongs to a document that may not be quoted

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    found = evidence(acts[own], own, token_ids, documents, decode, top=3, around=4)
    assert [(e.text, e.peak, e.activation) for e in found] == [
        ("16 17 18 19 20 21 22 23 24", "20", 0.9),
        ("70 71 72 73 74", "74", 0.7),
    ]
    assert evidence(np.zeros(len(own), dtype=np.float32), own, token_ids, documents, decode, top=3) == []


def test_the_sentence_is_made_of_the_terms_that_were_found() -> None:
    def terms(*texts: str) -> list[Term]:
        return [Term(text=text, z=5.0, documents=9) for text in texts]

    assert describe(terms("vote"), terms("vote", "party"), ["politics"], 0.9) == (
        "Fires on the tokens “vote” in text with “party”; goes with politics."
    )
    assert describe(terms("vote"), [], [], 0.1) == "Fires most on “vote”."
    assert describe([], terms("party"), [], 0.0) == "Fires in text with “party”."
    assert describe([], [], [], 0.0) == "Fires without a term that stands for it."

"""A planted rule is found and said; noise is called noise; no text of others or of the test split is told."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import numpy.typing as npt
import pytest

from feature_bank.errors import DataError
from feature_bank.schema import Predicate, PredicateTerm
from feature_bank.taxonomy import load_taxonomy
from tests.training.planted import (
    WORDS,
    WordTokenizer,
    cut,
    firing_where,
    keys,
    noise,
    planted_documents,
    small_taxonomy,
)
from training.corpus import OWN_SOURCE
from training.explain.executable import ExplainedFeature, explain_features
from training.explain.lexicality import lexicality
from training.explain.lexicons import Lexicon, concept_lexicons
from training.explain.logistic import fit_logistic, select_forward, sigmoid
from training.explain.segmented import SegmentedText
from training.explain.wording import NOTHING, wording
from training.simulation.fidelity import score_features


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="module")
def text(tokenizer: WordTokenizer) -> SegmentedText:
    return cut(planted_documents(extra=lambda i: " the ballot." if i % 4 == 0 else ""), tokenizer)


def explain(acts: npt.NDArray[np.float16], text: SegmentedText, tokenizer: WordTokenizer) -> list[ExplainedFeature]:
    return explain_features(acts, keys(acts.shape[1]), text, small_taxonomy(), tokenizer, seed=0)


def predicate(feature: ExplainedFeature) -> Predicate:
    assert feature.explanation.predicate is not None
    return feature.explanation.predicate


def bytes_of(found: list[ExplainedFeature]) -> list[str]:
    return [repr(feature) for feature in found]


def test_a_feature_that_fires_iff_a_word_stands_there_gets_that_word(
    text: SegmentedText, tokenizer: WordTokenizer
) -> None:
    (found,) = explain(firing_where(text, lambda piece: piece == "harbour"), text, tokenizer)
    (term,) = predicate(found).terms
    assert (term.kind, term.text) in {("token", "harbour"), ("ngram", "harbour")}
    assert term.weight > 5 > 0 > predicate(found).bias
    assert "“harbour”" in found.explanation.text
    assert (found.kind, found.lexicality > 0.95) == ("lexical", True)
    assert found.trigger_tokens[0].text == found.ngrams[0].text == "harbour"


def test_a_word_that_silences_the_feature_is_found_too(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    acts = firing_where(text, lambda piece: piece == "harbour")
    rows, owner = text.segments.rows()
    spoilt = np.zeros(len(text.segments), dtype=bool)
    spoilt[owner[[text.texts[row].strip() == "lantern" for row in rows]]] = True
    acts[rows[spoilt[owner]]] = 0.0
    (found,) = explain(acts, text, tokenizer)
    weights = {term.text: term.weight for term in predicate(found).terms}
    assert set(weights) == {"harbour", "lantern"}
    assert weights["harbour"] > 0 > weights["lantern"]
    assert re.fullmatch("Fires .*“harbour”; less .*“lantern”.", found.explanation.text)


def test_noise_is_called_noise(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    explained = explain(noise(text, 20), text, tokenizer)
    silent = [found for found in explained if not predicate(found).terms]
    assert len(silent) >= 18
    assert {found.explanation.text for found in silent} == {NOTHING}
    assert sum(bool(found.trigger_tokens or found.ngrams) for found in explained) <= 2
    assert all(found.kind == "conceptual" and found.lexicality < 0.05 for found in explained)


def test_features_that_never_or_always_fire_are_constants(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    for found in explain(firing_where(text, lambda _: False, lambda _: True), text, tokenizer):
        assert predicate(found).terms == []


def test_a_predicate_is_calibrated_to_the_rate_at_which_the_feature_fires(
    text: SegmentedText, tokenizer: WordTokenizer
) -> None:
    acts = firing_where(text, lambda piece: piece == "harbour") * (np.random.default_rng(1).random(1) < 2)
    acts[np.random.default_rng(2).random(len(acts)) < 0.3] = 0.0
    (found,) = explain(acts.astype(np.float16), text, tokenizer)
    fitted = text.segments.take(text.numbers("discovery"))
    holds = np.array(["harbour" in "".join(text.texts[a:b]) for a, b in zip(fitted.starts, fitted.stops, strict=True)])
    (term,) = predicate(found).terms
    p = sigmoid(predicate(found).bias + term.weight * holds)
    assert abs(p.mean() - (fitted.maxima(acts)[:, 0] >= 0.3).mean()) < 0.01


def test_chinese_is_told_by_pairs_of_characters(tokenizer: WordTokenizer) -> None:
    text = cut(planted_documents(extra=lambda i: " 选票发票投资推举." if i % 2 else ""), tokenizer)
    acts = firing_where(text, lambda piece: piece == "票")
    acts[1:][[piece != "投" for piece in text.texts[:-1]]] = 0.0
    (found,) = explain(acts, text, tokenizer)
    (term,) = predicate(found).terms
    assert term.kind == "ngram"
    assert term.text in {"选举", "举投", "投票"}


def test_a_concept_is_a_term_where_several_of_its_words_count(tokenizer: WordTokenizer) -> None:
    def extra(i: int) -> str:
        thing = ("ballot", "turnout")[i // 3 % 2] if i % 3 == 1 else "parcel"
        return f" The {thing} of {WORDS[i % 50]} and {WORDS[i % 31]} was seen by {WORDS[i % 17]}."

    text = cut(planted_documents(extra=extra), tokenizer)
    (found,) = explain(firing_where(text, lambda piece: piece in {"ballot", "turnout"}), text, tokenizer)
    assert (predicate(found).terms[0].kind, predicate(found).terms[0].text) == ("concept", "politics/votes")
    assert not {term.text for term in predicate(found).terms} & {"ballot", "turnout"}
    assert "words of the concept “Votes”" in found.explanation.text


def test_changing_the_test_split_changes_no_byte(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    documents = planted_documents(extra=lambda i: " the ballot." if i % 4 == 0 else "")
    poisoned = [
        dataclasses.replace(d, text="poison harbour " * 40, source=OWN_SOURCE) if d.split == "test" else d
        for d in documents
    ]
    rules = (
        lambda piece: piece == "harbour",
        lambda piece: piece in {"lantern", "票"},
        lambda piece: piece == "poison",
    )
    before = explain(firing_where(text, *rules), text, tokenizer)
    other = cut(poisoned, tokenizer)
    after = explain(firing_where(other, *rules), other, tokenizer)
    assert bytes_of(before) == bytes_of(after)
    assert "poison" not in "".join(bytes_of(after))


def test_an_explanation_depends_on_its_own_feature_alone(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    acts = np.concatenate([firing_where(text, lambda piece: piece in {"harbour", "票"}), noise(text, 3, 0.1)], axis=1)
    together = explain(acts, text, tokenizer)
    assert bytes_of(together) == bytes_of(explain(acts, text, tokenizer))
    assert bytes_of(together[:1]) == bytes_of(explain(acts[:, :1].copy(), text, tokenizer))


def test_splits_without_a_document_are_an_error_or_nothing_to_measure(tokenizer: WordTokenizer) -> None:
    documents = [dataclasses.replace(d, split="discovery") for d in planted_documents(60)]
    text = cut(documents, tokenizer)
    acts = firing_where(text, lambda piece: piece == "harbour")
    (found,) = explain(acts, text, tokenizer)
    assert predicate(found).terms[0].text == "harbour"
    assert score_features(acts, keys(1), [predicate(found)], text, small_taxonomy(), seed=0) == [[]]
    elsewhere = cut([dataclasses.replace(d, split="test") for d in documents], tokenizer)
    with pytest.raises(DataError, match="discovery split"):
        explain(acts, elsewhere, tokenizer)


def test_without_text_of_the_project_no_term_is_shown(tokenizer: WordTokenizer) -> None:
    text = cut([dataclasses.replace(d, source="elsewhere") for d in planted_documents(60)], tokenizer)
    (found,) = explain(firing_where(text, lambda piece: piece == "harbour"), text, tokenizer)
    assert "harbour" not in found.explanation.text
    assert "harbour" not in repr((found.trigger_tokens, found.ngrams))


def test_only_words_of_the_projects_own_text_are_shown(tokenizer: WordTokenizer) -> None:
    documents = planted_documents(extra=lambda i: " secretword came." if i % 3 == 1 else "")
    text = cut(documents, tokenizer)
    (found,) = explain(firing_where(text, lambda piece: piece == "secretword"), text, tokenizer)
    assert "secretword" not in repr(found)


@pytest.fixture(scope="module")
def lexicons() -> dict[str, Lexicon]:
    return concept_lexicons(load_taxonomy())


@pytest.mark.parametrize("seed", range(20))
def test_the_sentence_lists_exactly_the_terms(seed: int, lexicons: dict[str, Lexicon]) -> None:
    generator = np.random.default_rng(seed)
    names = [*generator.choice(sorted(lexicons), 4, replace=False)]
    terms = [
        PredicateTerm(kind=kind, text=str(text), weight=float(generator.normal()))
        for kind, texts in (
            ("token", ["vote", ",", "'s", '"']),
            ("ngram", ["vote", "the vote", "投票"]),
            ("concept", names),
        )
        for text in texts
    ]
    chosen = [terms[i] for i in generator.permutation(len(terms))[: int(generator.integers(0, 12))]]
    sentence = wording(Predicate(terms=chosen, bias=0.0), lexicons)
    expected = [lexicons[t.text].name if t.kind == "concept" else t.text for t in chosen]
    assert sorted(re.findall("“(.*?)”", sentence)) == sorted(expected)
    for part in sentence.rstrip(".").split("; "):
        quoted = set(re.findall("“(.*?)”", part))
        kinds = {"token"} if "token" in part else {"ngram", "concept"}
        sign = "less" in part.lower()
        here = {
            lexicons[t.text].name if t.kind == "concept" else t.text
            for t in chosen
            if t.kind in kinds and (t.weight <= 0) == sign
        }
        assert quoted == here


def test_the_words_of_a_concept_come_from_the_training_pairs_that_differ(lexicons: dict[str, Lexicon]) -> None:
    words = set(concept_lexicons(small_taxonomy())["politics/votes"].words)
    assert {"ballot", "turnout", "国会"} <= words
    assert not words & {"the", "long", "day", "hall", "secretword", "poll"}
    assert len(lexicons) > 100
    assert all(lexicon.words for lexicon in lexicons.values())


def test_lexicality_is_what_a_table_of_tokens_explains_elsewhere() -> None:
    generator = np.random.default_rng(0)
    token_ids = generator.integers(0, 30, 6000)
    table = generator.random(30)
    acts = np.stack([table[token_ids], generator.random(6000), np.zeros(6000), np.where(token_ids < 3, 9.0, 0)], axis=1)
    fitted, held = np.arange(4000), np.arange(4000, 6000)
    found = lexicality(acts.astype(np.float16), token_ids, fitted, held)
    assert found[0] > 0.95
    assert found[1] < 0.05
    assert found[2] == 0
    assert found[3] > 0.95
    unseen = np.where(np.arange(6000) < 4000, token_ids, token_ids + 100)
    assert (lexicality(acts.astype(np.float16), unseen, fitted, held) < 0.05).all()
    assert (lexicality(acts.astype(np.float16), token_ids, fitted, held[:0]) == 0).all()


def test_newton_finds_the_weights_and_stays_finite_when_a_term_decides_all() -> None:
    generator = np.random.default_rng(0)
    X = (generator.random((4000, 3)) < 0.4).astype(np.float64)
    y = generator.random(4000) < sigmoid(-1 + X @ [2.0, -1.0, 0.0])
    np.testing.assert_allclose(fit_logistic(X, y), [-1, 2, -1, 0], atol=0.25)
    beta = fit_logistic(X[:, :1], X[:, 0] > 0)
    assert np.isfinite(beta).all()
    assert beta[1] > 5


def test_forward_selection_takes_what_helps_on_held_out_cases_and_corrects_the_bias() -> None:
    generator = np.random.default_rng(1)
    X = (generator.random((3000, 10)) < 0.3).astype(np.float64)
    y = generator.random(3000) < sigmoid(-2 + X[:, :2] @ [3.0, 2.0])
    options = {"largest": 12, "least_gain": 0.002}
    fit = select_forward(X, y, X[::2], y[::2], rate=float(y.mean()), **options)
    assert set(fit.columns[:2]) == {0, 1}
    rare = select_forward(X, y, X[::2], y[::2], rate=0.01, **options)
    assert rare.bias < fit.bias - 2

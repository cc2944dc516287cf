"""A right explanation scores near 1 and above its null, a wrong one does not; samples, intervals, missing answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from feature_bank.schema import Predicate, PredicateTerm, SimulationScore
from tests.training.planted import (
    WordTokenizer,
    cut,
    firing_where,
    keys,
    noise,
    planted_documents,
    small_taxonomy,
)
from training.explain.executable import explain_features
from training.explain.lexicons import concept_lexicons
from training.explain.logistic import sigmoid
from training.explain.segmented import SegmentedText, grade
from training.simulation.executable import KEPT, ExecutableSimulator
from training.simulation.fidelity import score_features
from training.simulation.nulls import random_directions
from training.simulation.samples import Sample, Truth, choose_samples
from training.simulation.scores import correlations, score


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="module")
def text(tokenizer: WordTokenizer) -> SegmentedText:
    return cut(planted_documents(extra=lambda i: " the ballot stands." if i % 4 == 0 else ""), tokenizer)


def scored(acts: np.ndarray, text: SegmentedText, tokenizer: WordTokenizer) -> list[list[SimulationScore]]:
    names = keys(acts.shape[1])
    found = explain_features(acts, names, text, small_taxonomy(), tokenizer, seed=0)
    predicates = [f.explanation.predicate for f in found if f.explanation.predicate is not None]
    return score_features(acts, names, predicates, text, small_taxonomy(), seed=0)


def truth(grades: list[int] | np.ndarray, documents: np.ndarray | None = None, cut: int = 3) -> Truth:
    values = np.asarray(grades, dtype=np.int64)
    owner = np.arange(len(values)) if documents is None else np.asarray(documents)
    return Truth(grades=values, fires=values >= cut, weights=np.ones(len(values)), documents=owner)


def test_planted_words_score_near_one_above_their_null(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    acts = firing_where(text, lambda p: p == "harbour", lambda p: p == "lantern")
    for by_level in scored(acts, text, tokenizer):
        assert [s.level for s in by_level] == ["segment", "token"]
        for s in by_level:
            assert s.corr > (0.98 if s.level == "segment" else 0.7)  # a token after the word is felt a little, too
            assert s.corr_low > 0.65 > 0.5 > s.corr_null
            assert s.auroc is not None
            assert s.auroc > 0.99
            assert (s.balanced_accuracy or 0) > 0.9
            assert (s.pr_auc or 0) > 0.97
            assert (s.simulator, s.missing) == ("executable", 0)


def test_noise_does_not_exceed_its_null_beyond_chance(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    acts = np.concatenate([firing_where(text, lambda p: p == "harbour", lambda p: p == "lantern"), noise(text, 30)], 1)
    found = scored(acts, text, tokenizer)[2:]
    for level in (0, 1):
        corrs = np.array([by_level[level].corr for by_level in found])
        lows = np.array([by_level[level].corr_low for by_level in found])
        assert abs(corrs.mean()) < 0.05
        assert (lows > 0).mean() <= 0.1


def test_an_explanation_of_something_else_scores_like_its_null(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    acts = firing_where(text, lambda p: p == "harbour", lambda p: p == "lantern")
    names = keys(2)
    found = explain_features(acts, names, text, small_taxonomy(), tokenizer, seed=0)
    predicates = [f.explanation.predicate for f in found if f.explanation.predicate is not None][::-1]
    for by_level in score_features(acts, names, predicates, text, small_taxonomy(), seed=0):
        assert all(s.corr < 0.3 for s in by_level)


def test_scores_do_not_change_between_runs_nor_with_text_of_other_splits(
    text: SegmentedText, tokenizer: WordTokenizer
) -> None:
    acts = np.concatenate([firing_where(text, lambda p: p == "harbour"), noise(text, 2, 0.1)], axis=1)
    assert scored(acts, text, tokenizer) == scored(acts, text, tokenizer)


# Samples


def samples(acts: np.ndarray, text: SegmentedText, **options: int) -> list[Sample]:
    return list(choose_samples(acts, keys(acts.shape[1]), text, seed=0, **options))


def test_samples_hold_test_segments_and_as_many_as_asked_for(text: SegmentedText) -> None:
    acts = firing_where(text, lambda p: p == "harbour", lambda p: p == "nowhere")
    test = set(text.numbers("test").tolist())
    for n, firing in ((60, 20), (100_000, 100_000)):
        for sample in samples(acts, text, segments=n, firing=firing):
            assert len(sample.numbers) == min(n, len(test))
            assert set(sample.numbers.tolist()) <= test
            assert (np.diff(sample.numbers) > 0).all()
            assert sample.segments.fires.sum() <= firing
            assert sample.segments.weights.sum() == pytest.approx(len(test))


def test_the_firing_segments_of_a_sample_span_the_strengths(text: SegmentedText) -> None:
    acts = (
        firing_where(text, lambda p: p == "harbour") * np.linspace(0.4, 2, len(text.texts), dtype=np.float16)[:, None]
    )
    (sample,) = samples(acts, text, segments=40, firing=10)
    strengths = text.segments.take(sample.numbers).maxima(acts)[:, 0]
    everything = text.segments.take(text.numbers("test")).maxima(acts)[:, 0]
    assert strengths.max() == everything.max()
    assert strengths[strengths > 0].min() == everything[everything > 0].min()


def test_the_tokens_of_a_sample_are_those_of_its_segments(text: SegmentedText) -> None:
    acts = firing_where(text, lambda p: p == "harbour")
    (sample,) = samples(acts, text, segments=50, firing=25)
    tokens = [t for n in sample.numbers for t in text.tokens(n)]
    assert [t.strip() == "harbour" for t in tokens] == sample.tokens.fires.tolist()
    for place, number in enumerate(sample.numbers):
        mine = sample.owner == place
        assert sample.segments.grades[place] == sample.tokens.grades[mine].max()
        assert (sample.tokens.documents[mine] == text.segments.documents[number]).all()


def test_a_samples_texts_do_not_depend_on_other_features(text: SegmentedText) -> None:
    acts = np.concatenate([firing_where(text, lambda p: p == "harbour"), noise(text, 2)], axis=1)
    alone, beside = samples(acts[:, :1].copy(), text)[0], samples(acts, text)[0]
    assert np.array_equal(alone.numbers, beside.numbers)


def test_grades_are_tenths_of_the_scale_up_to_ten() -> None:
    assert grade(np.array([0, 0.09, 0.1, 0.55, 0.99, 1.0, 7.0])).tolist() == [0, 0, 1, 5, 9, 10, 10]


# The executable simulator


def test_predictions_follow_the_predicate(text: SegmentedText) -> None:
    predicate = Predicate(
        terms=[
            PredicateTerm(kind="token", text="harbour", weight=3.0),
            PredicateTerm(kind="ngram", text="the ballot", weight=2.0),
            PredicateTerm(kind="concept", text="politics/votes", weight=1.0),
            PredicateTerm(kind="concept", text="politics/unknown", weight=50.0),
        ],
        bias=-2.0,
    )
    simulator = ExecutableSimulator.of([predicate], concept_lexicons(small_taxonomy()), text)
    places = np.arange(len(simulator.numbers))
    whole = simulator.segments(places, np.array([0]))[:, 0]
    by_token = simulator.tokens(places, np.array([0]))[:, 0]
    start = 0
    for place, number in enumerate(simulator.numbers):
        tokens = [t.strip() for t in text.tokens(number)]
        here = by_token[start : start + len(tokens)]
        start += len(tokens)
        word = "".join(text.tokens(number))
        z = -2 + 3 * ("harbour" in tokens) + 2 * ("the ballot" in word) + ("ballot" in tokens)
        assert whole[place] == pytest.approx(float(sigmoid(np.array(z))), rel=1e-5)
        assert here.max() <= whole[place] + 1e-6
        if "harbour" in tokens and "ballot" not in tokens and tokens.count("harbour") == 1:
            peak = tokens.index("harbour")
            q = np.full(len(tokens), float(sigmoid(np.array(-2.0))))
            q[peak] = sigmoid(np.array(1.0))
            expected = [whole[place] * sum(q[t - k] * KEPT**k for k in range(t + 1)) / 3 for t in range(len(tokens))]
            np.testing.assert_allclose(here, expected, rtol=1e-4)
    assert start == len(by_token)


def test_any_choice_of_segments_is_predicted_as_in_the_whole(text: SegmentedText) -> None:
    predicate = Predicate(terms=[PredicateTerm(kind="token", text="harbour", weight=3.0)], bias=-2.0)
    simulator = ExecutableSimulator.of([predicate] * 2, {}, text)
    chosen = np.array([5, 2, 9])
    everything = simulator.tokens(np.arange(len(simulator.numbers)), np.array([1]))
    assert np.array_equal(simulator.tokens(chosen, np.array([1])), everything[simulator.rows(chosen)])
    assert simulator.tokens(np.zeros(0, dtype=np.int64), np.array([0, 1])).shape == (0, 2)


# Scores


def test_the_correlation_is_pearsons() -> None:
    generator = np.random.default_rng(0)
    grades, prediction = generator.integers(0, 11, 90), generator.random((90, 4))
    found = correlations(prediction, grades)
    np.testing.assert_allclose(found, [pearsonr(prediction[:, i], grades)[0] for i in range(4)])
    assert correlations(np.ones((90, 1)), grades).tolist() == [0.0]


def test_missing_answers_are_left_out_and_counted_never_zero() -> None:
    generator = np.random.default_rng(0)
    grades = generator.integers(0, 11, 300)
    prediction = grades + generator.normal(size=300)
    gaps = prediction.copy()
    gaps[::3] = np.nan
    kept = np.isfinite(gaps)
    options = {"level": "segment", "simulator": "someone", "seed": 0}
    found = score(gaps, truth(grades), None, **options)
    alone = score(prediction[kept], truth(grades[kept], np.flatnonzero(kept)), None, **options)
    assert found is not None
    assert alone is not None
    assert (found.n, found.missing) == (200, 100)
    assert found.model_copy(update={"missing": 0}) == alone
    assert score(np.full(300, np.nan), truth(grades), None, **options) is None
    assert score(prediction, truth(np.zeros(300)), None, **options) is None


def test_a_constant_prediction_scores_nothing() -> None:
    found = score(np.full(50, 0.3), truth([0, 9] * 25), None, level="segment", simulator="x", seed=0)
    assert found is not None
    assert (found.corr, found.corr_low, found.corr_high, found.auroc, found.balanced_accuracy) == (0, 0, 0, 0.5, 0.5)


def test_the_interval_holds_the_truth_as_often_as_it_says_and_heeds_documents() -> None:
    hits, widths = 0, []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        common = generator.normal(size=60).repeat(5)  # five segments of a document go together
        x = common + 0.5 * generator.normal(size=300)
        y = 0.6 * common + generator.normal(size=60).repeat(5) + 0.5 * generator.normal(size=300)
        rho = 0.6 / np.sqrt(1.25 * (0.36 + 1 + 0.25))
        graded = truth(np.round(1000 * y), np.arange(60).repeat(5), cut=10**9)
        found = score(x, graded, None, level="segment", simulator="x", seed=0)
        assert found is not None
        hits += found.corr_low <= rho <= found.corr_high
        single = score(x, truth(graded.grades, cut=10**9), None, level="segment", simulator="x", seed=0)
        assert single is not None
        widths.append((found.corr_high - found.corr_low) / (single.corr_high - single.corr_low))
    assert 0.88 <= hits / 120 <= 1
    assert np.mean(widths) > 1.3


def test_the_null_is_that_of_the_other_explanations() -> None:
    generator = np.random.default_rng(0)
    grades = generator.integers(0, 11, 400)
    others = generator.random((400, 60))
    others[:, 0] = 1.0  # says the same of everything: no comparison
    others[::2, 1] = np.nan
    found = score(grades.astype(float), truth(grades), others, level="token", simulator="x", seed=0)
    assert found is not None
    known = [pearsonr(others[::1, i], grades)[0] for i in range(2, 60)]
    known.append(pearsonr(others[1::2, 1], grades[1::2])[0])
    assert found.corr_null == pytest.approx(np.quantile(known, 0.975), abs=1e-4)
    assert found.corr_null_mean == pytest.approx(np.mean(known), abs=1e-4)


def test_precision_is_at_the_base_rate_whatever_share_of_the_sample_fires() -> None:
    generator = np.random.default_rng(0)
    fires = generator.random(40_000) < 0.05
    prediction = fires + generator.normal(size=40_000)
    rows = np.concatenate([np.flatnonzero(fires)[:800], np.flatnonzero(~fires)[:800]])
    weights = np.where(fires[rows], fires.sum() / 800, (~fires).sum() / 800)
    options = {"level": "segment", "simulator": "x", "seed": 0}
    grades = 9 * fires.astype(np.int64)
    whole = score(prediction, truth(grades), None, **options)
    part = Truth(grades=grades[rows], fires=fires[rows], weights=weights, documents=rows)
    sampled = score(prediction[rows], part, None, **options)
    assert whole is not None
    assert sampled is not None
    assert sampled.pr_auc == pytest.approx(whole.pr_auc, abs=0.04)
    assert sampled.auroc == pytest.approx(whole.auroc, abs=0.03)
    assert sampled.balanced_accuracy == pytest.approx(whole.balanced_accuracy, abs=0.03)


# Random directions


def test_random_directions_fire_as_often_as_asked_in_the_form_of_features() -> None:
    activations = torch.randn(20_000, 16) + 5
    density = np.array([0.002, 0.05, 0.3])
    found = random_directions(activations.bfloat16(), density, seed=0)
    np.testing.assert_allclose((found > 0).mean(0), density, rtol=0.1)
    assert found.dtype == np.float16
    assert (found >= 0).all()
    np.testing.assert_allclose(np.quantile(found.astype(np.float32), 0.999, axis=0), 1.0, rtol=0.02)
    assert np.array_equal(found, random_directions(activations.bfloat16(), density, seed=0))
    assert not np.array_equal(found, random_directions(activations.bfloat16(), density, seed=1))

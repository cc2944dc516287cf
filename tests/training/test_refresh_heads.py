"""Heads fitted again: the present weights are the minimum where nothing is to be learnt, and marks pull where it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from feature_bank.heads import agreement, moving_average
from feature_bank.schema import Calibration, HeadRecord, Pooling, StreamingHead
from training.calibration import document_scores
from training.corpus import Document
from training.refresh_checks import Version, check_fixed, problems_of, share
from training.refresh_fit import Replay, refit_head
from training.refresh_heads import ends_of, fit_held, forms_of, join_rows, read_rows, score
from training.refresh_marks import Items
from training.refresh_texts import Texts, join_texts

POOLING = Pooling(window=8, min_tokens=2, ceiling=1.0, evidence_tokens=2, settle_tokens=3, streaming_window=4)
FEATURES = 6
NAMES = [f"L1/{i}" for i in range(FEATURES)]
POSITION = {name: place for place, name in enumerate(NAMES)}
WEIGHTS = [4.0, 3.0, 2.0, 0.5, -0.5, 0.1]


def text(rng: np.random.Generator, strong: list[int], tokens: int = 14) -> Texts:
    """A text on which the `strong` features are active and the others hardly ever."""
    acts = rng.random((tokens, FEATURES)) * (rng.random((tokens, FEATURES)) < 0.1)
    acts[:, strong] = 0.5 + 0.5 * rng.random((tokens, len(strong)))
    return Texts(
        acts=sparse.csr_matrix(acts.astype(np.float32)),
        text=np.zeros(tokens, dtype=np.int64),
        segment=np.zeros(tokens, dtype=np.int64),
        n=1,
    )


def head() -> HeadRecord:
    calibration = Calibration(slope=1.5, intercept=0.1)
    return HeadRecord(
        features=NAMES,
        weights=WEIGHTS,
        bias=-3.0,
        calibration=calibration,
        thresholds={"0.01": 0.6, "0.05": 0.5},
        streaming_thresholds={"0.01": 0.7, "0.05": 0.6},
        steering=[0.1] * FEATURES,
        streaming=StreamingHead(weights=WEIGHTS, bias=-3.2, calibration=calibration),
    )


@pytest.fixture
def replay() -> Replay:
    """Texts of the domain have features 0 and 1, others have features 3 to 5 at most."""
    rng = np.random.default_rng(1)
    documents, texts = [], []
    for number in range(240):
        present = number % 2 == 0
        splits = ("discovery", "discovery", "discovery", "calibration", "test")
        documents.append(
            Document(
                id=f"sg-poli-{number}",
                text=str(number),
                role="passage",
                domains=frozenset({"politics"} if present else ()),
                known=frozenset({"politics"}),
                source="sailguard",
                licence="x",
                split=splits[number % 5],  # type: ignore[arg-type]  # it is one of them
            )
        )
        texts.append(text(rng, [0, 1] if present else [int(rng.integers(3, 6))]))
    return Replay(documents=documents, texts=join_texts(texts, FEATURES))


def marked(strong: list[int], label: bool, *, count: int = 20, flagged: bool = True, streamed: bool = False) -> Items:
    rng = np.random.default_rng(7)
    return Items(
        texts=join_texts([text(rng, strong) for _ in range(count)], FEATURES),
        ids=tuple(range(count)),
        streamed=np.full(count, streamed),
        held_out=np.arange(count) % 5 == 0,
        labels=tuple({"politics": label} for _ in range(count)),
        flagged=tuple(frozenset({"politics"} if flagged else ()) for _ in range(count)),
        judged=("a bank",) * count,
        skipped={},
    )


def nothing() -> Items:
    return replace(
        marked([0], False, count=1),
        texts=join_texts([], FEATURES),
        ids=(),
        streamed=np.zeros(0, dtype=np.bool_),
        held_out=np.zeros(0, dtype=np.bool_),
        labels=(),
        flagged=(),
        judged=(),
    )


def refit(replay: Replay, items: Items, rejected: frozenset[str] = frozenset()) -> HeadRecord:
    return refit_head("politics", head(), POOLING, POSITION, replay=replay, items=items, rejected=rejected).head


def reach(record: HeadRecord, texts: Texts, form: int = 0) -> np.ndarray:
    chosen = forms_of(record, POOLING, POSITION)[form]
    return chosen.probabilities(score(chosen, texts)) >= chosen.thresholds["0.01"]


def test_scores_are_those_that_training_and_the_guard_compute(replay: Replay) -> None:
    acts = replay.texts.acts.toarray()
    for form in forms_of(head(), POOLING, POSITION):
        expected = document_scores(
            acts.astype(np.float16),
            replay.texts.text,
            form.weights.astype(np.float32),
            form.bias,
            POOLING,
            replay.texts.n,
            streaming=form.streaming,
        )
        np.testing.assert_allclose(score(form, replay.texts), expected, atol=1e-2)


def test_a_text_of_several_segments_scores_as_its_best_one() -> None:
    rng = np.random.default_rng(3)
    weak, strong = text(rng, [4]), text(rng, [0, 1])
    both = join_texts([weak, strong], FEATURES)
    together = replace(both, text=np.zeros_like(both.text), n=1)
    form = forms_of(head(), POOLING, POSITION)[0]
    assert score(form, together)[0] == max(score(form, both))
    logits = moving_average((strong.acts @ form.weights)[:, None], strong.segment, POOLING) + form.bias
    assert score(form, strong)[0] == pytest.approx(agreement(logits, strong.segment, 2, settled=8).max())


def test_without_marks_the_head_is_the_same_object_for_object(replay: Replay) -> None:
    assert refit(replay, nothing()) == head()


def test_the_present_weights_are_the_minimum_of_what_replayed_texts_ask_for(replay: Replay) -> None:
    for form in forms_of(head(), POOLING, POSITION):
        ends = ends_of(form, replay.texts, spread=True)
        rows = read_rows(form, replay.texts, ends, None, np.ones(replay.texts.n))
        assert fit_held(form, rows, ridge=1.0, rejected=np.zeros(FEATURES, dtype=np.bool_)) is form


def test_marks_that_agree_with_the_guard_change_nothing(replay: Replay) -> None:
    assert refit(replay, marked([0, 1], True)) == head()
    assert refit(replay, marked([4], False, flagged=False)) == head()


@pytest.mark.parametrize("form", [0, 1])
def test_marked_false_positives_fall_below_the_threshold_and_other_decisions_stay(replay: Replay, form: int) -> None:
    items = marked([1, 2], False, streamed=bool(form))
    assert reach(head(), items.texts, form).all()
    record = refit(replay, items)
    assert not reach(record, items.texts, form).any()  # the held-out fifth too
    before, after = (reach(one, replay.texts, form) for one in (head(), record))
    assert (before != after).mean() <= 0.02
    assert record.steering == head().steering


def test_marked_misses_reach_the_threshold(replay: Replay) -> None:
    items = marked([2], True, flagged=False)
    assert not reach(head(), items.texts).any()
    record = refit(replay, items)
    assert reach(record, items.texts).all()
    assert (reach(head(), replay.texts) != reach(record, replay.texts)).mean() <= 0.02


def test_a_rejected_feature_weighs_nothing_and_the_others_take_its_part(replay: Replay) -> None:
    record = refit(replay, nothing(), frozenset({"L1/0"}))
    assert record.weights[0] == 0.0
    assert record.streaming is not None
    assert record.streaming.weights[0] == 0.0
    assert record.weights[1] > WEIGHTS[1]
    assert record.steering == head().steering


def test_the_minimum_does_not_depend_on_how_the_rows_come(replay: Replay) -> None:
    form = forms_of(head(), POOLING, POSITION)[0]
    held = read_rows(form, replay.texts, ends_of(form, replay.texts, spread=False), None, np.ones(replay.texts.n))
    items = marked([1, 2], False)
    ends = ends_of(form, items.texts, spread=False)
    pulled = read_rows(form, items.texts, ends, np.zeros(len(items)), np.ones(len(items)))
    none = np.zeros(FEATURES, dtype=np.bool_)
    one, other = (fit_held(form, join_rows(p), ridge=1.0, rejected=none) for p in ([held, pulled], [pulled, held]))
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)


def test_wrong_marks_are_found_out_on_texts_that_were_never_fitted_on(replay: Replay) -> None:
    record = refit(replay, marked([0, 1], False, count=200))
    test = replay.rows("test")
    documents = [replay.documents[row] for row in test.tolist()]
    versions = [Version(heads={"politics": h}, pooling=POOLING, position=POSITION) for h in (head(), record)]
    before, after = [(version, replay.texts.choose(test)) for version in versions]
    fixed = {"test": check_fixed(documents, before, after)}
    problems = problems_of(fixed, {}, margin=0.01, rate="0.01")
    assert problems
    assert "politics" in problems[0]
    assert "falls by" in problems[0]


def test_a_share_has_an_interval_even_at_its_ends() -> None:
    nobody = share(np.zeros(20, dtype=np.bool_))
    assert nobody["value"] == 0.0
    assert 0.1 < nobody["high"] < 0.2
    assert share(np.zeros(0, dtype=np.bool_))["value"] is None

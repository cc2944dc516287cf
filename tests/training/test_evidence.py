"""Evidence is drawn from every strength, its negatives are silent, and nothing of the test split is in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.training.planted import WordTokenizer, cut, firing_where, keys, planted_documents
from training.corpus import OWN_SOURCE
from training.explain.evidence import NEGATIVES, Twins, collect_evidence, quotable
from training.explain.interface import Excerpt, FeatureEvidence
from training.explain.segmented import FIRES, SegmentedText


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="module")
def text(tokenizer: WordTokenizer) -> SegmentedText:
    return cut(planted_documents(extra=lambda i: f" marked{i}"), tokenizer)


def strengths(text: SegmentedText) -> Any:
    """One feature that fires on harbour, everywhere at another strength, except in every third document."""
    acts = firing_where(text, lambda piece: piece == "harbour")
    acts *= np.linspace(0.5, 2, len(acts), dtype=np.float16)[:, None]
    rows, owner = text.segments.rows()
    acts[rows[text.segments.documents[owner] % 3 == 2]] = 0
    return acts


def collect(text: SegmentedText, tokenizer: WordTokenizer, **options: Any) -> FeatureEvidence:
    found = collect_evidence(
        strengths(text),
        keys(1),
        text,
        tokenizer.decode,
        triggers=[["harbour"]],
        promoted=[["quay"]],
        domains=[["politics"]],
        seed=0,
        **options,
    )
    return found[0]


def marks(excerpts: tuple[Excerpt, ...]) -> set[int]:
    """The documents that excerpts come from, as far as they end one."""
    return {int(t.strip().removeprefix("marked")) for e in excerpts for t in e.tokens if "marked" in t}


def test_positives_fire_and_span_the_strengths(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    found = collect(text, tokenizer)
    peaks = [max(e.activations) for e in found.positives]
    assert len(peaks) == 10
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 1.4
    assert FIRES <= peaks[-1] < 0.7
    assert all(len(e.tokens) == len(e.activations) for e in found.positives)


def test_negatives_are_silent_and_say_why_they_were_chosen(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    found = collect(text, tokenizer)
    assert all(max(e.activations) == 0 for e in found.negatives)
    reasons = [e.reason for e in found.negatives]
    assert {r: reasons.count(r) for r in set(reasons)} == {"lookalike": NEGATIVES, "random": NEGATIVES}
    lookalikes = [e for e in found.negatives if e.reason == "lookalike"]
    assert all("harbour" in {t.strip() for t in e.tokens} for e in lookalikes)
    assert (found.id, found.promoted_tokens) == ("L0/0", ("quay",))


def test_nothing_comes_from_the_test_split(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    for seed_text in (False, True):
        found = collect(text, tokenizer, quotable_only=seed_text)
        documents = [text.documents[i] for i in marks(found.positives + found.negatives)]
        assert documents
        assert all(d.split != "test" for d in documents)
        assert not seed_text or all(d.source == OWN_SOURCE for d in documents)


def test_what_may_be_quoted_is_the_projects_own_text(text: SegmentedText) -> None:
    allowed = {text.documents[text.segments.documents[n]].id for n in range(len(text.segments)) if quotable(text, n)}
    assert allowed == {d.id for d in text.documents if d.source == OWN_SOURCE and d.split != "test"}


def test_negatives_of_the_same_domain_have_its_label(tokenizer: WordTokenizer) -> None:
    import dataclasses

    documents = [
        dataclasses.replace(d, domains=frozenset({"politics"})) if int(d.id) % 5 == 1 else d
        for d in planted_documents(extra=lambda i: f" marked{i}")
    ]
    text = cut(documents, tokenizer)
    found = collect(text, tokenizer)
    same = tuple(e for e in found.negatives if e.reason == "same_domain")
    assert len(same) == NEGATIVES
    assert all(i % 5 == 1 for i in marks(same))


def test_the_twin_of_a_text_with_a_concept_is_a_negative(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    ids = [tokenizer(t)["input_ids"] for t in ("a harbour here", "a garden here", "a harbour too", "a harbour as well")]
    documents = np.repeat(np.arange(4), [len(row) for row in ids])
    token_ids = np.array([t for row in ids for t in row])
    acts = np.array([[0.9 if tokenizer.decode([t]).strip() == "harbour" else 0.0] for t in token_ids], dtype=np.float16)
    twins = Twins(acts=acts, token_ids=token_ids, documents=documents, pairs=[(0, 1), (2, 3)])
    contrast = [e for e in collect(text, tokenizer, twins=twins).negatives if e.reason == "contrast"]
    assert ["".join(e.tokens) for e in contrast] == ["a garden here"]


def test_a_feature_that_never_fires_has_no_positives(text: SegmentedText, tokenizer: WordTokenizer) -> None:
    silent = np.zeros((len(text.texts), 1), dtype=np.float16)
    options: dict[str, Any] = {"triggers": [[]], "promoted": [[]], "domains": [[]], "seed": 0}
    (found,) = collect_evidence(silent, keys(1), text, tokenizer.decode, **options)
    assert found.positives == ()
    assert {e.reason for e in found.negatives} == {"random"}
    assert collect_evidence(silent, keys(1), text, tokenizer.decode, **options) == [found]

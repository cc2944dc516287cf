"""The shipped bank keeps what its card promises, and the card says what the bank holds."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.bank_card import PAGE, page
from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.taxonomy import DOMAINS


@pytest.fixture(scope="module")
def bank() -> Bank:
    return Bank.load(shipped_bank_path())


def test_the_card_is_made_from_the_bank() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_feature_is_explained_and_admitted_and_of_the_saes_scored_above_its_null(bank: Bank) -> None:
    for feature in bank.features:
        assert feature.admitted, feature.id
        assert feature.explanation, feature.id
        assert feature.predicate is not None, feature.id
        assert (feature.threshold > 0) == (not feature.direction), feature.id
        levels = {score.level: score for score in feature.fidelity}
        assert set(levels) == {"segment", "token"}, feature.id
        assert feature.direction or levels["segment"].corr_low > levels["segment"].corr_null, feature.id
        assert levels["segment"].n >= 200, feature.id


def test_it_is_large_enough_in_every_domain_and_small_enough_to_ship(bank: Bank) -> None:
    tagged = Counter(domain for feature in bank.features for domain in feature.domains)
    assert len(bank.features) >= 120
    assert all(tagged[domain] >= 20 for domain in DOMAINS)
    of_saes = Counter(domain for feature in bank.features if not feature.direction for domain in feature.domains)
    assert all(of_saes[domain] >= 20 for domain in DOMAINS)
    assert len(bank.hook_names) > 1
    assert sum(path.stat().st_size for path in shipped_bank_path().iterdir()) <= 5_000_000


def test_the_text_of_an_explanation_names_exactly_its_terms(bank: Bank) -> None:
    for feature in bank.features:
        assert feature.predicate is not None
        for term in feature.predicate.terms:
            if term.kind != "concept":
                assert f"“{term.text}”" in feature.explanation, (feature.id, term.text)

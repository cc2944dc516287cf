"""A search finds every feature in which all terms occur, no other, and no query is an error but an empty one."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_bank.bank import Bank
from feature_bank.errors import BankError
from feature_bank.review import Draft, append_reviews, effective, load_labels
from feature_bank.schema import ConceptScore, Evidence, Predicate, PredicateTerm, SimulationScore, Term
from feature_bank.search import FeatureFilter, SearchIndex, find_score, score_names
from tests.factories import make_bank
from tests.feature_bank.variants import write_variant

CONCEPT = "election_campaign"
CHANGES: dict[str, dict[str, Any]] = {
    "L1/3": {"explanation": "Fires on “vote”, “ballot” in text on an election", "concepts": [CONCEPT]},
    "L1/10": {
        "explanation": "devoted fans; CAFÉ",
        "promoted_tokens": ["投票"],
        "evidence": [Evidence(text="every vote in the election counts", peak="vote", activation=1.0)],
        "scores": {"auroc_politics": 0.9, "tpr_politics": 0.4},
    },
    "L1/17": {"explanation": "选举与投票", "trigger_tokens": [Term(text="人民代表大会", z=3.0, documents=5)]},
    "L1/24": {
        "explanation": "the prime minister's office",
        "predicate": Predicate(bias=-3.0, terms=[PredicateTerm(kind="ngram", text="cabinet", weight=2.0)]),
        "promoted_tokens": ["parliament"],
        "fidelity": [
            SimulationScore(level=level, simulator="executable", n=200, corr=corr, corr_low=corr - 0.1,
                            corr_high=corr + 0.1, corr_null=0.1, corr_null_mean=0.0)
            for level, corr in (("token", 0.6), ("segment", 0.4))
        ],
    },
    "L1/31": {
        "explanation": "a minister of prime numbers",
        "admitted": False,
        "concept_scores": [ConceptScore(domain="terror", concept="attack_claims", pairs=8, frequency=0.75, reverse=0.0,
                                        q=0.01)],
    },
    "L3/3": {"explanation": "the U.S. 50% rule _ and 'quotes\" (brackets)* AND NOT NEAR"},
}  # fmt: skip


@pytest.fixture
def bank(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Bank:
    plain = make_bank(tmp_path / "plain", tiny_model, tiny_tokenizer)
    return write_variant(plain, tmp_path / "bank", features=lambda f: CHANGES.get(f.id, {}))


@pytest.fixture
def index(bank: Bank) -> SearchIndex:
    return SearchIndex(bank, effective(bank, ()))


def ids(index: SearchIndex, query: str) -> list[str]:
    return [hit.feature.id for hit in index.search(query)]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("vote", ["L1/3", "L1/10"]),  # not inside "devoted", as words begin with it; the explanation counts more
        ("VOTE Election", ["L1/3", "L1/10"]),
        ("vot* elec", ["L1/3", "L1/10"]),
        ("ballot counts", []),
        ("evoted", ["L1/10"]),  # no word begins with it
        ("cafe", ["L1/10"]),
        ("ｃａｆｅ", ["L1/10"]),  # full width
        ("选举", ["L1/17"]),
        ("投票", ["L1/17", "L1/10"]),  # the explanation counts more, in terms too short for trigrams too
        ("民代表", ["L1/17"]),
        ("选举 人民代表", ["L1/17"]),
        ('"prime minister"', ["L1/24"]),
        ("prime minister", ["L1/24", "L1/31"]),
        ("cabinet", ["L1/24"]),
        ("parliament", ["L1/24"]),
        ("attack_claims", ["L1/31"]),
        ("attack claims", ["L1/31"]),
        ("L1/3", ["L1/3", "L1/38", "L1/31"]),
        ("l1/24", ["L1/24"]),
        ("50%", ["L3/3"]),
        ("U.S.", ["L3/3"]),
        ("%", ["L3/3"]),
        ("'quotes\"", ["L3/3"]),
        ("nothing-like-it", []),
    ],
)  # fmt: skip
def test_a_query_finds_the_features_with_all_its_terms(index: SearchIndex, query: str, found: list[str]) -> None:
    assert ids(index, query) == found


def test_hits_tell_where_the_terms_stand(index: SearchIndex) -> None:
    assert [hit.fields for hit in index.search("vote")] == [("explanation",), ("evidence",)]
    assert index.search("人民代表")[0].fields == ("terms",)
    assert index.search("l1/24")[0].fields == ("id",)
    assert all(hit.relevance > 0 for hit in index.search("vote"))


def test_a_replaced_explanation_is_found_by_both_texts(bank: Bank, tmp_path: Path) -> None:
    draft = Draft.model_validate(
        {"feature": "L1/3", "verdict": "relabel", "reviewer": "ann", "overrides": {"explanation": "turnout figures"}}
    )
    append_reviews(tmp_path / "bank", [draft])
    index = SearchIndex(bank, load_labels(tmp_path / "bank", bank)[1])
    assert ids(index, "turnout") == ids(index, "ballot") == ["L1/3"]


@pytest.mark.parametrize("query", ["", "   ", "\x00\n", "*", '""', "\ud800"])
def test_an_empty_query_is_refused(index: SearchIndex, query: str) -> None:
    with pytest.raises(BankError, match="empty"):
        index.search(query)


def test_a_query_that_is_too_long_is_refused(index: SearchIndex) -> None:
    for query in ("x" * 1001, " ".join(f"w{n}" for n in range(33))):
        with pytest.raises(BankError, match="at most"):
            index.search(query)
    index.search("x" * 1000)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(query=st.text(st.one_of(st.sampled_from(string.punctuation + ' "*vote选举\x00'), st.characters()), max_size=30))
def test_no_query_is_a_syntax_error(index: SearchIndex, query: str) -> None:
    try:
        hits = index.search(query)
    except BankError:  # it holds no term
        hits = []
    assert len({hit.feature.id for hit in hits}) == len(hits)


# ---- filters -------------------------------------------------------------------------------------


def chosen(bank: Bank, folder: Path, **wanted: Any) -> list[str]:
    return [f.id for f in FeatureFilter(**wanted).select(bank, load_labels(folder, bank)[1])]


def test_each_filter_keeps_what_it_names_and_all_together_narrow(bank: Bank, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    assert chosen(bank, folder) == [feature.id for feature in bank.features]
    assert set(chosen(bank, folder, domain="politics")) == {f.id for f in bank.features if "politics" in f.domains}
    assert set(chosen(bank, folder, layer=3)) == {f.id for f in bank.features if f.layer == 3}
    assert chosen(bank, folder, admitted=False) == ["L1/31"]
    assert chosen(bank, folder, concept=CONCEPT) == ["L1/3"]
    assert chosen(bank, folder, min_scores={"auroc": 0.8}) == ["L1/10"]
    assert chosen(bank, folder, min_scores={"auroc": 0.8, "tpr_politics": 0.5}) == []
    assert chosen(bank, folder, min_scores={"corr": 0.4}) == ["L1/24"]
    assert chosen(bank, folder, min_scores={"corr": 0.5}) == []  # the segment level stands for the others
    assert chosen(bank, folder, min_scores={"frequency": 0.7}) == ["L1/31"]
    assert chosen(bank, folder, domain="politics", layer=1, min_scores={"auroc": 0.8}) == ["L1/10"]
    assert chosen(bank, folder, domain="violence", min_scores={"auroc": 0.0}) == []


def test_filters_go_by_the_effective_label(bank: Bank, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    data = {"feature": "L1/3", "verdict": "relabel", "reviewer": "ann", "overrides": {"domains": ["terror"]}}
    append_reviews(folder, [Draft.model_validate(data)])
    assert "L1/3" in chosen(bank, folder, domain="terror")
    assert "L1/3" not in chosen(bank, folder, domain="pornography")
    assert chosen(bank, folder, status="accepted") == ["L1/3"]
    assert len(chosen(bank, folder, status="unreviewed")) == len(bank.features) - 1


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"domain": "weather"}, "domain"),
        ({"concept": "weather"}, "concept"),
        ({"min_scores": {"x": 1.0}}, "min_scores"),
    ],
)
def test_what_a_bank_cannot_have_is_refused_by_name(
    bank: Bank, tmp_path: Path, wanted: dict[str, Any], field: str
) -> None:
    with pytest.raises(BankError) as error:
        chosen(bank, tmp_path / "bank", **wanted)
    assert error.value.field == field


def test_scores_are_found_by_name(bank: Bank) -> None:
    names = score_names(bank)
    assert set(names) == {"auroc", "corr", "corr_low", "frequency", "density", "auroc_politics", "tpr_politics"}
    for name in names:
        assert any(find_score(feature, name) is not None for feature in bank.features)

"""The metric of contrast pairs: its formulas, its null, and that nothing but the pairs' own sides decides it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import training.selection
from feature_bank.errors import DataError
from feature_bank.taxonomy import Domain
from tests.training.selection_samples import D_SAE, SIZES, entry, make_texts, random_firing
from training.contrast import BoolArray, ContrastTexts, PairRows
from training.ranking import choose, lead
from training.selection import DomainContrast, contrast_figures
from training.selection_report import check_selection_folder, write_selection


def planted(texts: ContrastTexts, fired: BoolArray, concept: str, feature: int = 5) -> BoolArray:
    """The same with one feature that fires on exactly the positives of one concept."""
    changed = fired.copy()
    changed[:, feature] = False
    changed[[p.positive for p in texts.pairs if p.concept == concept], feature] = True
    return changed


def by_hand(fired: BoolArray, pairs: Sequence[PairRows]) -> tuple[Any, Any]:
    """f and r of every feature, pair by pair."""
    f = np.zeros(fired.shape[1])
    r = np.zeros(fired.shape[1])
    for pair in pairs:
        f += fired[pair.positive] & ~fired[pair.negative]
        r += fired[pair.negative] & ~fired[pair.positive]
    return f / len(pairs), r / len(pairs)


# The formulas


@given(seed=st.integers(0, 10_000), best=st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_every_figure_is_its_formula(seed: int, best: int) -> None:
    texts = make_texts()
    fired = random_firing(texts, seed=seed)
    for domain, found in contrast_figures(fired, texts, permutations=5, best=best).items():
        own = [p for p in texts.pairs if p.domain == domain]
        parts = {name: [p for p in own if p.concept == name] for name in found.concepts}
        assert sum(map(len, parts.values())) == len(own)
        for contrast, pairs in ((found, own), *((found.concepts[name], part) for name, part in parts.items())):
            f, r = by_hand(fired, pairs)
            net = np.sort(np.maximum(0, f - r))[::-1]
            assert contrast.pairs == len(pairs)
            assert contrast.i_cdf.value == pytest.approx(f.mean(), abs=1e-12)
            assert contrast.net.value == pytest.approx(net.mean(), abs=1e-12)
            assert contrast.separation.value == pytest.approx(net[: min(best, D_SAE)].mean(), abs=1e-7)
            assert contrast.best_frequency == pytest.approx(f.max())
            thresholds = np.arange(1, len(pairs) + 1) / len(pairs)
            assert contrast.curve.l0.tolist() == [(f >= t - 1e-9).sum() for t in thresholds]


def test_i_cdf_is_the_integral_of_the_curve_over_the_features_for_the_null_as_well() -> None:
    texts = make_texts()
    for found in contrast_figures(random_firing(texts), texts, permutations=30).values():
        for contrast in (found, *found.concepts.values()):
            area = contrast.curve.l0.sum() / contrast.pairs / D_SAE
            assert contrast.i_cdf.value == pytest.approx(area, rel=1e-12)
            null_area = contrast.curve.null.sum() / contrast.pairs / D_SAE
            assert contrast.i_cdf.null == pytest.approx(null_area, rel=1e-12)


def test_blocks_of_features_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_texts()
    fired = random_firing(texts)
    whole = contrast_figures(fired, texts, permutations=20, best=10)
    monkeypatch.setattr(training.selection, "_BLOCK", 7)
    assert flat(contrast_figures(fired, texts, permutations=20, best=10)) == flat(whole)


def flat(figures: Mapping[Domain, DomainContrast]) -> str:
    """All figures as text, for a comparison to the last bit."""
    with np.printoptions(threshold=10**6, precision=17):
        return repr(figures)


# What decides, and what does not


def test_the_order_of_pairs_does_not_matter() -> None:
    texts = make_texts()
    fired = random_firing(texts)
    order = np.random.default_rng(1).permutation(len(texts.pairs))
    shuffled = replace(texts, pairs=[texts.pairs[i] for i in order])
    first, second = (contrast_figures(fired, t, permutations=20) for t in (texts, shuffled))
    for domain, found in first.items():
        other = second[domain]
        assert found.separation == other.separation
        assert found.left_out == other.left_out
        for name, concept in found.concepts.items():
            assert flat({domain: concept}) == flat({domain: other.concepts[name]})  # type: ignore[dict-item]


def test_a_domain_and_a_concept_have_the_figures_of_their_own_pairs_alone() -> None:
    texts = make_texts()
    fired = random_firing(texts)
    whole = contrast_figures(fired, texts, permutations=20)
    for domain in SIZES:
        alone = replace(texts, pairs=[p for p in texts.pairs if p.domain == domain])
        found = contrast_figures(fired, alone, permutations=20)
        assert list(found) == [domain]
        assert flat(found) == flat({d: w for d, w in whole.items() if d == domain})
        for concept in SIZES[domain]:
            lone = replace(texts, pairs=[p for p in alone.pairs if p.concept == concept])
            (figures,) = contrast_figures(fired, lone, permutations=20).values()
            assert figures.concepts[concept].separation == whole[domain].concepts[concept].separation
            assert figures.separation == figures.concepts[concept].separation
            assert figures.left_out == ()


def test_a_feature_that_fires_on_both_sides_or_on_neither_counts_for_nothing() -> None:
    texts = make_texts()
    fired = np.zeros((len(texts.documents), D_SAE), dtype=bool)
    fired[:, ::2] = True
    for found in contrast_figures(fired, texts, permutations=20).values():
        assert found.i_cdf.value == found.separation.value == found.net.null == found.best_frequency == 0
        assert found.curve.l0.sum() == 0


def test_no_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="no contrast pairs"):
        contrast_figures(np.zeros((1, 1), dtype=bool), replace(make_texts(), pairs=[]))


# The null


def test_the_null_covers_an_sae_to_which_the_sides_are_alike() -> None:
    texts = make_texts()
    inside: list[bool] = []
    for seed in range(60):
        for found in contrast_figures(random_firing(texts, seed=seed), texts, permutations=100, best=8).values():
            for figure in (found.i_cdf, found.net, found.separation):
                inside.append(figure.null_low <= figure.value <= figure.null_high)
    assert 0.88 <= np.mean(inside) <= 0.99  # 95 % of 360, which hang together


def test_more_firing_on_one_side_raises_i_cdf_over_its_null_without_any_concept_feature() -> None:
    """Why SAEs are not ranked by it: all features fire a little more often on one side."""
    texts = make_texts({"politics": {"votes": 80, "parties": 80}})
    fired = random_firing(texts, density=0.6)
    extra = np.random.default_rng(9).random(fired.shape) < 0.1
    fired[[p.positive for p in texts.pairs]] |= extra[[p.positive for p in texts.pairs]]
    (found,) = contrast_figures(fired, texts, permutations=50, best=4).values()
    knowing = planted(texts, random_firing(texts, density=0.6), "votes")
    concept = contrast_figures(knowing, texts, permutations=50, best=4)
    assert found.i_cdf.value > found.i_cdf.null_high
    assert concept["politics"].i_cdf.value < found.i_cdf.value
    assert concept["politics"].separation.margin > found.separation.margin


def test_a_planted_feature_has_frequency_one_and_ranks_its_sae_first() -> None:
    texts = make_texts()
    base = random_firing(texts, density=0.15)
    figures = {
        "plain": contrast_figures(base, texts, permutations=50, best=8),
        "planted": contrast_figures(planted(texts, base, "attacks"), texts, permutations=50, best=8),
    }
    found = figures["planted"]["terror"]
    assert found.concepts["attacks"].best_frequency == 1
    assert found.best_frequency == pytest.approx(10 / 16)
    assert found.concepts["attacks"].curve.l0[-1] == 1
    assert found.concepts["attacks"].curve.null_high[-1] < 1
    assert found.separation.value > found.separation.null_high
    choice = choose(sorted((entry(f, name) for name, f in figures.items()), key=lambda r: -r.separation))
    assert choice.overall == "planted"
    other = figures["plain"]["politics"], figures["planted"]["politics"]
    assert abs(other[0].separation.margin - other[1].separation.margin) < 0.02


# Ranking and choice


def test_the_choice_names_the_first_of_all_and_of_each_hook_point_with_its_reasons() -> None:
    texts = make_texts()
    base = random_firing(texts, density=0.1)
    strong = planted(texts, planted(texts, base, "votes", 3), "attacks", 4)
    plain_figures = contrast_figures(base, texts, permutations=30, best=4)
    strong_figures = contrast_figures(strong, texts, permutations=30, best=4)
    ranked = [
        entry(strong_figures, "b", layer=2),
        entry(plain_figures, "a", layer=2),
        entry(plain_figures, "c", layer=1),
    ]
    choice = choose(ranked)
    assert choice.overall == "b"
    assert choice.by_hook_point == {"blocks.1.hook_resid_post": "c", "blocks.2.hook_resid_post": "b"}
    assert choice.why[0].startswith("b separates best")
    assert "The next is a" in choice.why[1]
    assert any("At blocks.2.hook_resid_post: b" in line for line in choice.why)
    alike = choose([entry(plain_figures, "a"), entry(plain_figures, "c")])
    assert "do not tell the two apart" in alike.why[1]
    assert "within its null" in " ".join(alike.why)
    with pytest.raises(DataError, match="no SAE"):
        choose([])


def test_a_lead_is_paired_and_has_an_error_only_where_concepts_can_be_left_out() -> None:
    texts = make_texts()
    base = contrast_figures(random_firing(texts), texts, permutations=20)
    other = contrast_figures(random_firing(texts, seed=1), texts, permutations=20)
    assert lead(entry(base), entry(base)) == (0, 0)
    one, back = lead(entry(base), entry(other)), lead(entry(other), entry(base))
    assert one.value == -back.value
    assert one.error == back.error
    assert one.error is not None
    assert one.error > 0
    single = make_texts({"politics": {"votes": 5}})
    lone = entry(contrast_figures(random_firing(single), single, permutations=20))
    assert lone.error is None
    assert lead(lone, lone).error is None


# What is written


def test_a_selection_is_written_whole_and_the_same_byte_for_byte(tmp_path: Path) -> None:
    texts = make_texts()
    ranked = [
        entry(contrast_figures(random_firing(texts, seed=seed), texts, permutations=20), f"$a{seed}", l0, layer)
        for seed, (l0, layer) in enumerate([(4.0, 0), (8.0, 0), (0.0, 1)])
    ]
    contents = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_selection(folder, ranked, choose(ranked), {"model": {"id": "tiny"}})
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {f"selection.{kind}" for kind in ("json", "csv", "png", "svg")}
    record = json.loads(contents[0]["selection.json"])
    assert [sae["name"] for sae in record["saes"]] == ["$a0", "$a1", "$a2"]
    for sae, made in zip(record["saes"], ranked, strict=True):
        assert sae["separation"] == pytest.approx(made.separation, abs=1e-6)
        for domain, found in made.domains.items():
            assert sae["domains"][domain]["curve"]["l0"] == found.curve.l0.tolist()
            assert sae["domains"][domain]["concepts"].keys() == found.concepts.keys()
    lines = contents[0]["selection.csv"].decode().splitlines()
    assert len(lines) == 1 + 3 * (2 + 5)
    assert {line.count(",") for line in lines} == {lines[0].count(",")}


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    check_selection_folder(tmp_path / "new")
    check_selection_folder(tmp_path)
    (tmp_path / "activations").mkdir()
    check_selection_folder(tmp_path)
    (tmp_path / "activations").rmdir()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DataError, match="something else"):
        check_selection_folder(tmp_path)
    with pytest.raises(DataError, match="a file"):
        check_selection_folder(tmp_path / "thesis.tex")

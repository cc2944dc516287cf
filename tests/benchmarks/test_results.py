"""Every committed result has the agreed form, the docs say what the results say, and the measuring itself is sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import baselines, leave_one_source_out, quality, results, tables
from benchmarks.keywords import KEYWORDS, count_keywords
from benchmarks.results import RESULTS, Figure, parse_result, read_result, write_result
from feature_bank.errors import DataError
from feature_bank.taxonomy import DOMAINS
from training.corpus import Document

COMMITTED = sorted(RESULTS.glob("*"))
FIGURES = {"decode_bs1": Figure(value=1.02, unit="ratio", n=15)}


# ---- the form of a result ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_every_committed_result_has_the_agreed_form(path: Path) -> None:
    result = read_result(path)
    assert path.suffix == ".json"
    assert json.loads(path.read_text(encoding="utf-8")).keys() == results.Result.model_fields.keys()
    assert "python" in result.versions


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_result("overhead", FIGURES, {"rounds": 15}, folder=tmp_path)
    result = read_result(path)
    assert result.figures == FIGURES
    assert result.detail == {"rounds": 15}
    assert result.value("decode_bs1") == 1.02
    assert result.value("decode_bs8") is None
    assert result.machine.cores >= 1


def test_a_refused_result_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = write_result("overhead", FIGURES, {}, folder=tmp_path)
    before = path.read_bytes()
    for detail in ({"x": float("nan")}, {"x": object()}, {"folder": "/".join(["", "home", "someone"])}):
        with pytest.raises(DataError):
            write_result("overhead", FIGURES, detail, folder=tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["overhead.json"]


def test_a_result_never_names_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "build-host-17")
    with pytest.raises(DataError, match="name of this machine"):
        write_result("overhead", FIGURES, {"where": "on build-host-17"}, folder=tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("date", "yesterday"),
        ("name", "other"),
        ("figures", {}),
        ("figures", {"Bad Key": {"value": 1.0, "unit": "ratio"}}),
        ("figures", {"k": {"value": float("inf"), "unit": "ratio"}}),
        ("figures", {"k": {"value": 1.0}}),
        ("machine", {"cores": 2, "memory_gb": 8.0, "cpu": "x", "gpu": None, "host": "y"}),
        ("extra", 1),
    ],
)
def test_a_malformed_result_is_refused_by_file_and_field(field: str, value: Any, tmp_path: Path) -> None:
    path = write_result("overhead", FIGURES, {}, folder=tmp_path)
    data = json.loads(path.read_text(encoding="utf-8")) | {field: value}
    with pytest.raises(DataError, match=r"overhead\.json"):
        parse_result(json.dumps(data), path.name)


# ---- the docs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(tables.PAGES))
def test_the_docs_show_the_committed_result(name: str) -> None:
    path, expected = tables.page(name)
    assert path.read_text(encoding="utf-8") == expected, "run `python -m benchmarks.tables`"


def test_replacing_a_table_keeps_everything_else_and_can_be_repeated() -> None:
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    once = tables.replace_table(text, "new", "page.md")
    assert once == f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter\n"
    assert tables.replace_table(once, "new", "page.md") == once


@pytest.mark.parametrize("text", ["none", tables.BEGIN, f"{tables.END}{tables.BEGIN}", 2 * tables.BEGIN + tables.END])
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"page\.md"):
        tables.replace_table(text, "new", "page.md")


# ---- detection ---------------------------------------------------------------------------------------------


def test_perfect_scores_measure_one_and_a_constant_measures_chance() -> None:
    labels = np.arange(200) < 50
    assert set(baselines.measures(labels, labels.astype(float)).values()) == {1.0}
    constant = baselines.measures(labels, np.zeros(200))
    assert constant == {"auroc": 0.5, "auprc": 0.25, "tpr_at_fpr1": 0.0, "tpr_at_fpr5": 0.0}


def test_one_class_alone_has_no_measures() -> None:
    assert baselines.measures(np.ones(5, dtype=bool), np.arange(5.0)) == {}


def test_at_most_the_given_share_of_negatives_exceeds_the_threshold() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 7, 99, 100, 1000):
        for negatives in (rng.normal(size=size), rng.integers(0, 3, size).astype(float)):
            threshold = baselines.threshold_at(negatives, 0.01)
            assert (negatives > threshold).mean() <= 0.01


def test_the_bootstrap_encloses_the_auroc_and_a_detector_leads_itself_by_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.4
    scores = labels + rng.normal(size=300)
    intervals = quality.bootstrap_auroc(labels, {"bank": scores, "probe": 2 * scores + 1}, repeats=100)
    low, high = intervals["bank"]
    assert low < baselines.measures(labels, scores)["auroc"] < high
    assert intervals["probe_lead"] == [0.0, 0.0]
    assert quality.bootstrap_auroc(labels, {"bank": scores, "probe": 2 * scores + 1}, repeats=100) == intervals


def test_a_source_that_is_left_out_is_judged_and_never_fitted_on() -> None:
    def rows(source: str, positive: bool, count: int) -> list[Document]:
        return [
            Document(
                id=f"{source}{positive}{i}",
                text="A text.",
                role="passage",
                domains=frozenset({"terror"} if positive else ()),
                known=frozenset({"terror"}),
                source=source,
                licence="none",
                split=("discovery", "calibration", "test")[i % 3],
            )
            for i in range(count)
        ]

    documents = rows("a", True, 60) + rows("a", False, 9) + rows("b", True, 60) + rows("c", False, 30)
    found = list(leave_one_source_out.folds(documents + rows("d", True, 29), "terror"))
    assert [fold.source for fold in found] == ["a", "b"]  # c has no positives, d too few
    for fold in found:
        assert not set(fold.fit.tolist()) & set(fold.judged.tolist())
        assert {i for i, d in enumerate(documents) if d.source == fold.source} <= set(fold.judged.tolist())
        assert all(documents[i].source != fold.source for i in fold.fit if i < len(documents))
        others = [documents[i] for i in fold.judged if documents[i].source != fold.source]
        assert others
        assert not any(d.domains or d.split == "discovery" for d in others)
    assert list(leave_one_source_out.folds(documents, "violence")) == []


def test_an_operating_point_divides_by_nothing_empty() -> None:
    hits = np.array([True, False, True, False])
    truth = np.array([True, True, False, False])
    assert quality.operating_point(truth, hits) == {"tpr": 0.5, "fpr": 0.5, "precision": 0.5}
    assert quality.operating_point(np.zeros(4, dtype=bool), np.zeros(4, dtype=bool)) == {
        "tpr": None,
        "fpr": 0.0,
        "precision": None,
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_keywords_count_as_whole_words_whatever_their_case(domain: Any) -> None:
    for word in KEYWORDS[domain]:
        assert count_keywords(f"({word.upper()})", domain) == 1
        assert count_keywords(f"x{word}x", domain) == 0
        assert word == word.lower()
    assert count_keywords("", domain) == 0
    assert len(set(KEYWORDS[domain])) == len(KEYWORDS[domain])

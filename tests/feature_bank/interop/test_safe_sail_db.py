"""Every row of a Safe-SAIL database becomes a feature, as published or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from feature_bank.errors import BankError
from feature_bank.interop.collection import Collection, holds_collection, load_collection, save_collection
from feature_bank.interop.safe_sail_db import MASK, MODEL, SCORE, read_safe_sail
from feature_bank.schema import FeatureRecord
from tests.feature_bank.interop.samples import ROWS, write_database

PUBLISHED = Path(os.environ.get("SAILGUARD_DATA") or "/nowhere") / "safe_sail" / "en_db.json.gz"


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    return read_safe_sail(write_database(tmp_path / "db.json"))


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="SAILGUARD_DATA names no folder with the published database")
def test_the_published_database_gives_the_published_counts(tmp_path: Path) -> None:
    found = read_safe_sail(PUBLISHED)
    counts = found.counts()
    assert (counts["features"], counts["tagged"]) == (4700, 1758)
    assert counts["tagged_by_domain"] == {"pornography": 309, "politics": 1144, "violence": 582, "terror": 63}
    assert counts["tagged_by_layer"] == {0: 479, 8: 502, 17: 397, 26: 218, 35: 162}
    assert (counts["masked"], counts["unexplained"]) == (1144, 13)
    assert all(feature.scores[SCORE] >= 0.2 for feature in found.features)
    assert not found.losses
    assert save_collection(tmp_path / "out", found, tool_version="0") == found


def test_nothing_is_added_lost_or_changed(collection: Collection) -> None:
    back = {
        f"{f.layer}_{f.index}": {
            "explanation": f.explanation,
            "correlation_score": f.scores[SCORE],
            "tag_list": f.domains,
        }
        for f in collection.features
    }
    assert back == ROWS
    assert [f.id for f in collection.features] == ["L1/2", "L1/5", "L1/9", "L2/0", "L2/7", "L2/11"]
    assert collection.model == MODEL


def test_masked_and_missing_explanations_stay_so_and_are_told_apart(collection: Collection) -> None:
    masked, missing, given = (collection.by_id[i] for i in ("L1/2", "L2/0", "L1/5"))
    assert (masked.masked, masked.explanation) == (True, MASK)
    assert (missing.masked, missing.explanation) == (False, None)
    assert not given.masked
    counts = collection.counts()
    assert (counts["masked"], counts["unexplained"]) == (1, 1)


def test_counts_are_by_tag_and_by_layer(collection: Collection) -> None:
    counts = collection.counts()
    assert (counts["features"], counts["tagged"]) == (6, 5)
    tags = Counter(tag for row in ROWS.values() for tag in row["tag_list"])
    assert counts["tagged_by_domain"] == tags
    assert counts["tagged_by_layer"] == {1: 3, 2: 2}
    assert counts["by_layer"] == {1: 3, 2: 3}


def test_search_by_words_domain_layer_and_score(collection: Collection) -> None:
    def ids(*args: Any, **kwargs: Any) -> list[str]:
        return [f.id for f in collection.search(*args, **kwargs)]

    assert ids() == [f.id for f in collection.features]
    assert ids("BALLOTS elections") == ["L1/9"]
    assert ids("l2/7") == ["L2/7"]
    assert ids(domain="violence", layer=2) == ["L2/7"]
    assert ids(domain="politics", min_scores={SCORE: 0.2}) == ["L1/2", "L1/5"]
    assert ids(min_scores={"auroc_politics": 0.0}) == []


def test_a_record_says_that_it_was_imported_and_claims_no_measured_fidelity(collection: Collection) -> None:
    known = {"hook_name": "blocks.1.hook_mlp_out", "threshold": 0.5, "scale": 2.0, "density": 0.01}
    records = {i: collection.by_id[i].to_record(**known) for i in ("L1/5", "L1/2", "L2/0")}
    record = records["L1/5"]
    assert record == FeatureRecord.model_validate(record.model_dump())
    assert record.explainer is not None
    assert record.explainer.method == "imported"
    assert record.fidelity == []
    assert record.scores == {SCORE: 0.41}
    assert records["L1/2"].explanation == MASK
    assert (records["L2/0"].explanation, records["L2/0"].explainer) == ("", None)
    more = collection.by_id["L1/5"].to_record(**known, scores={"auroc_politics": 0.8}, admitted=False)
    assert more.scores == {SCORE: 0.41, "auroc_politics": 0.8}
    assert not more.admitted


def test_gzipped_or_not_is_the_same(tmp_path: Path, collection: Collection) -> None:
    packed = read_safe_sail(write_database(tmp_path / "db.json.gz"))
    assert packed.features == collection.features
    assert packed.name == collection.name == "db"


def test_fields_of_another_version_are_listed_as_losses(tmp_path: Path) -> None:
    rows = {key: {**row, "votes": 3} for key, row in ROWS.items()}
    (loss,) = read_safe_sail(write_database(tmp_path / "db.json", rows)).losses
    assert (loss.field, loss.count) == ("votes", len(ROWS))


ROW = ROWS["1_5"]


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ({"1-5": ROW}, "1-5"),
        ({"01_5": ROW}, "01_5"),
        ({"1_5_2": ROW}, "1_5_2"),
        ({"1_5": None}, "1_5"),
        ({"1_5": [ROW]}, "1_5"),
        ({"1_5": {k: v for k, v in ROW.items() if k != "tag_list"}}, "1_5.tag_list"),
        ({"1_5": {**ROW, "tag_list": None}}, "1_5.tag_list"),
        ({"1_5": {**ROW, "tag_list": ["weather"]}}, "1_5.tag_list"),
        ({"1_5": {**ROW, "tag_list": [["politics"]]}}, "1_5.tag_list"),
        ({"1_5": {**ROW, "tag_list": ["politics", "politics"]}}, "1_5.tag_list"),
        ({"1_5": {**ROW, "explanation": 3}}, "1_5.explanation"),
        ({"1_5": {**ROW, "explanation": "\ud800"}}, "1_5.explanation"),
        ({"1_5": {**ROW, "correlation_score": None}}, "1_5.correlation_score"),
        ({"1_5": {**ROW, "correlation_score": True}}, "1_5.correlation_score"),
        ({"1_5": {**ROW, "correlation_score": "0.4"}}, "1_5.correlation_score"),
        ({"1_5": {**ROW, "correlation_score": float("nan")}}, "1_5.correlation_score"),
        ({"1_5": {**ROW, "correlation_score": 10**400}}, "1_5.correlation_score"),
        ({"1_5": {**ROW, "correlation_score": 1.5}}, "1_5.correlation_score"),
        ({}, None),
        ([ROW], None),
    ],
)
def test_a_malformed_row_is_refused_with_its_place(tmp_path: Path, rows: Any, place: str | None) -> None:
    path = write_database(tmp_path / "db.json", rows)
    with pytest.raises(BankError) as error:
        read_safe_sail(path)
    assert (error.value.file, error.value.field) == (str(path), place)


def test_a_feature_or_field_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db.json"
    row = json.dumps(ROW)
    path.write_text(f'{{"1_5": {row}, "1_5": {row}}}')
    with pytest.raises(BankError, match="twice") as error:
        read_safe_sail(path)
    assert error.value.field == "1_5"


@pytest.mark.parametrize("damage", ["missing", "half", "text", "folder"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = write_database(tmp_path / "db.json.gz")
    raw = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "text":
        path.write_text("not JSON")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(BankError) as error:
        read_safe_sail(path)
    assert error.value.file == str(path)


def test_a_collection_comes_back_as_it_was_saved_and_is_no_bank(tmp_path: Path, collection: Collection) -> None:
    from feature_bank.bank import Bank

    saved = save_collection(tmp_path / "out", collection, tool_version="0")
    assert saved == load_collection(tmp_path / "out") == collection
    assert holds_collection(tmp_path / "out")
    with pytest.raises(BankError, match="no bank"):
        Bank.load(tmp_path / "out")
    with pytest.raises(BankError, match="no collection"):
        load_collection(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "field"),
    [
        ("features.jsonl", "ballots", "bullets", "sha256"),
        ("collection.json", '"features": 6', '"features": -6', "features"),
        ("collection.json", "sailguard-collection", "sailguard-bank", "kind"),
        ("collection.json", '"schema_version": 1', '"schema_version": 2', "schema_version"),
    ],
)
def test_an_altered_collection_is_refused(
    tmp_path: Path, collection: Collection, name: str, old: str, new: str, field: str
) -> None:
    save_collection(tmp_path / "out", collection, tool_version="0")
    path = tmp_path / "out" / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BankError) as error:
        load_collection(tmp_path / "out")
    assert (error.value.file, error.value.field) == (name, field)

"""Rows are checked where they are read, split by hash, and tokenised without loss; the shipped text is well-formed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_bank.errors import DataError
from feature_bank.layout import head_ids
from feature_bank.taxonomy import DOMAINS
from tests.training.samples import document
from training.corpus import OWN_SOURCE, corpus_hash, read_documents, read_rows, split_of, tokenise
from training.discovery import labels
from training.pipeline import own_corpora

GOOD: dict[str, Any] = {"id": "a", "text": "a good row", "role": "prompt", "domains": ["politics"], "known": ["terror"]}


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'"text"', "field 'text'"),
        (b'{"role": "prompt"}', "field 'text'"),
        (b'{"text": null}', "field 'text'"),
        (b'{"text": "x", "role": "user"}', "field 'role': 'user'"),
        (b'{"text": "x", "role": ""}', "field 'role': ''"),
        (b'{"text": "x", "role": ["prompt"]}', "field 'role'"),
        (b'{"text": "x", "domains": ["weather"]}', "field 'domains'.*weather"),
        (b'{"text": "x", "domains": "politics"}', "field 'domains'"),
        (b'{"text": "x", "known": [["terror"]]}', "field 'known'"),
        (b'{"text": "x", "known": {}}', "field 'known'"),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(
    tmp_path: Path, line: bytes, complaint: str, compressed: bool
) -> None:
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    raw = json.dumps(GOOD).encode() + b"\n\n" + line + b"\n"
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    with pytest.raises(DataError, match=rf"(?s)rows\.jsonl.*line 3.*{complaint}"):
        read_documents([path])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(np.random.default_rng(0).bytes(5000))
    for name, data in {
        "cut.gz": whole[:-100],
        "short.gz": whole[:12],
        "altered.gz": whole[:20] + b"\xff" * 60 + whole[80:],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            list(read_rows(tmp_path / name))
    for missing in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(DataError, match=missing.name):
            list(read_rows(missing))


def test_compression_changes_nothing_but_the_files_own_hash(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [GOOD, {"text": "中文 and more"}]
    plain, packed = write(tmp_path / "rows.jsonl", *rows), write(tmp_path / "rows.jsonl.gz", *rows)
    (documents, (record,)), (again, (packed_record,)) = read_documents([plain]), read_documents([packed])
    assert documents == again
    assert corpus_hash(documents) == corpus_hash(again)
    assert (record.name, record.rows) == (packed_record.name, packed_record.rows) == ("rows.jsonl", 2)
    assert record.sha256 != packed_record.sha256


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        read_documents([write(tmp_path / "rows.jsonl", {"text": " \n"})])


def test_a_repeated_text_counts_once_a_role(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"text": "same"}, {"text": "same"}, {"text": "same", "role": "prompt"})
    second = write(tmp_path / "b.jsonl", {"text": "same", "domains": ["terror"]}, {"text": "other"})
    documents, records = read_documents([first, second])
    assert [(d.text, d.role) for d in documents] == [("same", "passage"), ("same", "prompt"), ("other", "passage")]
    assert [r.rows for r in records] == [3, 2]


def test_a_row_needs_only_its_text(tmp_path: Path) -> None:
    bare, nulls = {"text": "alone"}, {"text": "null", "id": None, "role": None, "domains": None, "known": None}
    for found in read_documents([write(tmp_path / "rows.jsonl", bare, nulls)])[0]:
        assert (found.role, found.domains, found.known) == ("passage", frozenset(), frozenset())


def test_what_is_not_known_is_unlabelled_not_negative(tmp_path: Path) -> None:
    documents, _ = read_documents([write(tmp_path / "rows.jsonl", GOOD)])
    found = {domain: documents[0].label(domain) for domain in DOMAINS}
    assert found == {"politics": True, "terror": False, "pornography": None, "violence": None}
    splits = ("discovery", "calibration", "test")
    assert [len(labels(documents, domain, splits).rows) for domain in DOMAINS] == [0, 1, 0, 1]


def test_both_sides_of_a_pair_fall_into_one_split(tmp_path: Path) -> None:
    rows = []
    for i in range(200):
        rows += [
            {"id": f"p{i}", "twin": f"p{i}n", "text": f"with {i}"},
            {"id": f"p{i}n", "twin": f"p{i}", "text": f"without {i}"},
        ]
    documents, _ = read_documents([write(tmp_path / "rows.jsonl", *rows)])
    assert all(a.split == b.split for a, b in zip(documents[::2], documents[1::2], strict=True))
    assert {d.split for d in documents} == {"discovery", "calibration", "test"}


def test_the_splits_are_seven_two_and_one_parts_in_ten() -> None:
    counted = Counter(split_of(f"document {i}") for i in range(2000))
    assert [round(counted[s] / 2000, 1) for s in ("discovery", "calibration", "test")] == [0.7, 0.2, 0.1]


def test_a_row_of_the_test_split_is_kept_out_of_fitting(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "split": "test", "domains": ["terror"]} for i in range(30)]
    documents, _ = read_documents([write(tmp_path / "rows.jsonl", *rows)])
    assert {d.split for d in documents} == {"test"}
    assert len(labels(documents, "terror", ("discovery", "calibration")).rows) == 0


def test_lone_surrogates_anywhere_in_a_row_are_replaced(tmp_path: Path, tiny_tokenizer: Any) -> None:
    broken = {field: f"{field} \ud800 end" for field in ("id", "text", "twin", "source", "licence")}
    documents, records = read_documents([write(tmp_path / "rows.jsonl", broken, {"text": "pair \ud83d\ude00"})])
    assert [d.text for d in documents] == ["text \ufffd end", "pair \U0001f600"]
    for text in (documents[0].id, documents[0].source, records[0].model_dump_json(), corpus_hash(documents)):
        text.encode()
    assert len(tokenise(documents, tiny_tokenizer, max_tokens=20)) == 2


def test_the_corpus_hash_depends_on_every_part_that_matters() -> None:
    base = document("text", id="a", split="test")
    others = [
        document("other", id="a", split="test"),
        document("text", id="b", split="test"),
        document("text", id="a", split="discovery"),
        document("text", id="a", split="test", role="prompt"),
        document("text", id="a", split="test", known=["terror"]),
        document("text", id="a", split="test", domains=["terror"]),
    ]
    assert len({corpus_hash([d]) for d in [base, *others]}) == 7
    assert corpus_hash([base, others[0]]) != corpus_hash([others[0], base])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=3), st.integers(1, 30))
def test_tokenising_keeps_the_head_of_every_text(tiny_tokenizer: Any, texts: list[str], limit: int) -> None:
    documents = [document(t, role=role) for t in texts for role in ("prompt", "response", "passage")]
    found = {s.document: s for s in tokenise(documents, tiny_tokenizer, max_tokens=limit)}
    for index, d in enumerate(documents):
        own = tiny_tokenizer(d.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not own:
            assert index not in found
            continue
        head = head_ids(tiny_tokenizer, d.role)
        sequence = found[index]
        assert sequence.ids == head + own[:limit]
        special = set(tiny_tokenizer.all_special_ids)
        assert not special & {sequence.ids[p] for p in sequence.positions}
        assert set(range(len(head), len(sequence.ids))) <= set(sequence.positions.tolist())


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_pairs_differ_in_their_concept_alone(domain: str) -> None:
    path = next(p for p in own_corpora() if p.stem == domain)
    rows = {row["id"]: row for _, row in read_rows(path)}
    differences = []
    for row in rows.values():
        twin = rows[row["twin"]]
        assert twin["twin"] == row["id"]
        assert (domain in row["domains"]) != (domain in twin["domains"])
        assert domain in row["known"]
        for field in ("role", "style", "lang", "split"):
            assert row[field] == twin[field], (row["id"], field)
        if domain in row["domains"]:
            longer = max(len(row["text"]), len(twin["text"]))
            differences.append((len(row["text"]) - len(twin["text"])) / longer)
    assert abs(mean(differences)) < 0.05  # length does not give the label away
    assert max(map(abs, differences)) < 0.25


def test_the_shipped_rows_are_distinct_and_complete() -> None:
    rows = [row for path in own_corpora() for _, row in read_rows(path)]
    assert {p.stem for p in own_corpora()} == set(DOMAINS)
    for field in ("id", "text"):
        assert [value for value, n in Counter(row[field] for row in rows).items() if n > 1] == []
    assert {row["source"] for row in rows} == {OWN_SOURCE}
    assert {row["split"] for row in rows} == {"fit", "test"}
    assert all(set(row["domains"]) <= set(row["known"]) for row in rows)
    documents, _ = read_documents(own_corpora())
    assert len(documents) == len(rows)
    assert all(d.split == "test" for d, row in zip(documents, rows, strict=True) if row["split"] == "test")

"""Text in bulk is read as text row by row would be, compactly, and what is left out is counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_bank.errors import DataError
from feature_bank.layout import chat_ids
from tests.training.samples import document, toy_sequences
from training.corpus import tokenise
from training.texts import TokenTable, read_texts

TEXTS = ["Hi.", "A somewhat longer text, with 42 in it.", "<|im_end|> is no control token", "中文也要读。"]
MESSAGES = [{"role": "user", "content": "Hello <|im_start|>"}, {"role": "assistant", "content": "Hello to you."}]


def write(path: Path, *rows: Any) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_tuples(sequences: Any) -> list[tuple[int, list[int], list[int], int]]:
    return [(s.document, s.ids, s.positions.tolist(), s.special) for s in sequences]


@pytest.mark.parametrize(("text_format", "role"), [("plain", "passage"), ("chat", "prompt")])
def test_texts_are_read_as_documents_are(tmp_path: Path, tiny_tokenizer: Any, text_format: Any, role: str) -> None:
    files = [
        write(tmp_path / "a.jsonl", *({"text": t} for t in TEXTS[:2])),
        write(tmp_path / "b.jsonl.gz", *({"text": t} for t in TEXTS[2:])),
    ]
    table, counts = read_texts(files, tiny_tokenizer, text_format=text_format, max_tokens=12)
    expected = tokenise([document(t, role=role) for t in TEXTS], tiny_tokenizer, max_tokens=12)
    assert as_tuples(table) == as_tuples(expected)
    assert (counts.rows, counts.cut) == (4, sum(len(t.encode()) > 12 for t in TEXTS))
    assert counts.kept_tokens == sum(len(s.positions) for s in expected)
    special = set(tiny_tokenizer.all_special_ids)
    assert counts.special_tokens == sum(token in special for s in expected for token in s.ids) >= 4


def test_a_conversation_is_read_in_the_template(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES}, {"text": "x"})
    table, counts = read_texts([path], tiny_tokenizer, text_format="chat", max_tokens=500)
    ids = chat_ids(tiny_tokenizer, MESSAGES).ids
    special = set(tiny_tokenizer.all_special_ids)
    assert table[0].ids == ids
    assert [ids[p] for p in table[0].positions] == [token for token in ids if token not in special]
    assert (len(table), table[1].document, counts.repeated) == (2, 2, 1)
    cut, counts = read_texts([path], tiny_tokenizer, text_format="chat", max_tokens=20)
    assert cut[0].ids == ids[:20]
    assert counts.cut == 1


def test_reading_ends_when_there_is_enough(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", *({"text": f"text {i:02d}"} for i in range(50)), {"text": None})
    table, counts = read_texts([path], tiny_tokenizer, text_format="plain", max_tokens=100, total_tokens=31)
    assert (len(table), counts.rows, counts.kept_tokens) == (5, 5, 35)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 51, field 'text'"):
        read_texts([path], tiny_tokenizer, text_format="plain", max_tokens=100)


@pytest.mark.parametrize(
    "messages", [None, [], "text", [{"role": "user"}], [{"role": "user", "content": 3}], [["user", "text"]]]
)
def test_messages_that_are_none_are_refused_by_field(tmp_path: Path, tiny_tokenizer: Any, messages: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "x"}, {"messages": messages})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2, field 'messages'"):
        read_texts([path], tiny_tokenizer, text_format="chat", max_tokens=100)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2, field 'text'"):
        read_texts([path], tiny_tokenizer, text_format="plain", max_tokens=100)


def test_empty_texts_are_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": ""}, {"text": "x"})
    table, counts = read_texts([path], tiny_tokenizer, text_format="plain", max_tokens=100)
    assert (len(table), table[0].document, counts.empty) == (1, 1, 1)


def test_a_table_holds_what_was_put_in() -> None:
    sequences, table = toy_sequences(20), TokenTable()
    for sequence in sequences:
        table.append(sequence)
    assert as_tuples(table) == as_tuples(sequences)
    assert as_tuples(table[3:-2]) == as_tuples(sequences[3:-2])
    assert as_tuples([table[-1]]) == as_tuples(sequences[-1:])
    assert table[0].positions.dtype == np.int64
    with pytest.raises(IndexError):
        table[20]

"""Segments tile every document, keep to their lengths and end where clauses do; token texts add up to the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.planted import WordTokenizer
from training.explain.segments import LONGEST, SHORTEST, Segments, cut_segments
from training.explain.token_texts import token_texts

PIECES = st.sampled_from([" word", ".", ",", "。", "，", "\n", " 3", "字", "?", '"', ""])


def cut_text(text: str) -> list[str]:
    tokenizer = WordTokenizer()
    pieces = [tokenizer.decode([t]) for t in tokenizer(text)["input_ids"]]
    found = cut_segments(pieces, np.zeros(len(pieces), dtype=np.int64))
    return ["".join(pieces[a:b]) for a, b in zip(found.starts, found.stops, strict=True)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.lists(PIECES, min_size=1, max_size=90), max_size=5))
def test_segments_tile_every_document_and_keep_to_their_lengths(documents: list[list[str]]) -> None:
    texts = [piece for d in documents for piece in d]
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    found = cut_segments(texts, owner)
    assert np.array_equal(found.rows()[0], np.arange(len(texts)))
    for document, start, stop in zip(found.documents, found.starts, found.stops, strict=True):
        assert (owner[start:stop] == document).all()
        length = len(documents[document])
        assert stop - start == length if length < SHORTEST else SHORTEST <= stop - start <= LONGEST


def test_segments_end_with_clauses_and_sentences() -> None:
    assert cut_text(
        "When the ferry came in that morning, the whole town stood at the pier. Nobody spoke! "
        "The captain went ashore with a parcel under his arm."
    ) == [
        "When the ferry came in that morning,",
        " the whole town stood at the pier.",
        " Nobody spoke! The captain went ashore with a parcel under his arm.",
    ]


def test_chinese_punctuation_ends_segments_too() -> None:
    assert cut_text("候选人在广场上向选民承诺，台下的掌声经久不断。记者问：“真的吗？”") == [
        "候选人在广场上向选民承诺，",
        "台下的掌声经久不断。",
        "记者问：“真的吗？”",
    ]


def test_text_without_punctuation_is_cut_into_windows_of_sixteen() -> None:
    lengths = [len(part.split()) for part in cut_text(" ".join(["word"] * 75))]
    assert lengths == [16, 16, 16, 16, 11]
    assert [len(part.split()) for part in cut_text(" ".join(["word"] * 67))] == [16, 16, 16, 19]


def test_a_point_inside_a_number_or_a_name_ends_nothing() -> None:
    (whole,) = cut_text("It rose by 3.5 percent in the U.S.A and by 1,200 units at example.org today")
    assert whole.endswith("today")


def test_no_text_gives_no_segments() -> None:
    assert len(cut_segments([], np.zeros(0, dtype=np.int64))) == 0


def test_the_maxima_are_those_of_the_segments_alone() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 5000)
    stops = np.cumsum(lengths)
    everything = Segments(documents=np.zeros(5000, dtype=np.int64), starts=stops - lengths, stops=stops)
    acts = (generator.random((stops[-1], 3)) * (generator.random((stops[-1], 3)) < 0.3)).astype(np.float16)
    for segments in (everything, everything.take(np.arange(7, 5000, 3))):
        naive = [acts[a:b].max(0) for a, b in zip(segments.starts, segments.stops, strict=True)]
        assert np.array_equal(segments.maxima(acts), np.array(naive))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.text(max_size=20).filter(lambda t: "\ufffd" not in t), min_size=1, max_size=4))
def test_token_texts_add_up_to_the_text(tiny_tokenizer: Any, documents: list[str]) -> None:
    encoded = [text.encode("utf-16", "ignore").decode("utf-16") for text in documents]
    ids = [tiny_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in encoded]
    owner = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    texts = token_texts(np.array([t for row in ids for t in row], dtype=np.int64), owner, tiny_tokenizer.decode)
    for number, text in enumerate(encoded):
        assert "".join(texts[i] for i in np.flatnonzero(owner == number)) == text


def test_a_character_is_the_text_of_the_last_of_its_tokens(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("票a", add_special_tokens=False)["input_ids"]
    assert token_texts(np.array(ids), np.zeros(4), tiny_tokenizer.decode) == ["", "", "票", "a"]


@pytest.mark.parametrize("kept", [1, 2])
def test_bytes_that_never_become_a_character_are_left_out(tiny_tokenizer: Any, kept: int) -> None:
    cut_off = tiny_tokenizer("票", add_special_tokens=False)["input_ids"][:kept]
    other = tiny_tokenizer("ab", add_special_tokens=False)["input_ids"]
    documents = np.array([0] * kept + [1, 1])
    assert token_texts(np.array(cut_off + other), documents, tiny_tokenizer.decode) == [""] * kept + ["a", "b"]
    within = token_texts(np.array(cut_off + other), np.zeros(kept + 2), tiny_tokenizer.decode)
    assert "".join(within) == "ab"


def test_a_space_that_a_token_drops_when_it_stands_alone_is_kept() -> None:
    pieces = {0: "The", 1: " vote", 2: " count"}

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).lstrip(" ")

    assert token_texts(np.array([0, 1, 2]), np.zeros(3), decode) == ["The", " vote", " count"]

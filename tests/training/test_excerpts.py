"""Quoted passages: whole characters, aligned activations, one a document, the strongest first."""

from __future__ import annotations

import numpy as np

from training.excerpts import excerpts, readable


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_the_parts_of_one_character_are_joined_and_keep_their_largest_activation() -> None:
    text = "a議b"
    ids = list(text.encode())
    tokens, values = readable(ids, [0.0, 0.1, 0.9, 0.2, 0.0], decode)
    assert tokens == ["a", "議", "b"]
    assert values == [0.0, 0.9, 0.0]


def test_a_character_that_is_cut_is_left_out_and_no_replacement_is_shown() -> None:
    tokens, values = readable(list("議b".encode())[1:], [0.5, 0.0, 0.1], decode)
    assert "\ufffd" not in "".join(tokens)
    assert "".join(tokens) == "b"
    assert len(tokens) == len(values)


def test_one_passage_a_document_the_strongest_first() -> None:
    texts = ["the cat sat here", "a dog", "no bird at all"]
    ids = np.array([b for text in texts for b in text.encode()])
    documents = np.repeat(np.arange(3), [len(text) for text in texts])
    acts = np.zeros(len(ids), dtype=np.float32)
    acts[4], acts[7], acts[18] = 0.5, 0.4, 0.8
    found = excerpts(acts, ids, documents, decode, top=3, around=5)
    assert [e.activation for e in found] == [0.8, 0.5]
    assert found[0].peak == "d"
    assert found[0].text == "a dog"
    for e in found:
        assert "".join(e.tokens).strip() == e.text
        assert max(e.activations) == e.activation
        assert len(e.tokens) <= 11

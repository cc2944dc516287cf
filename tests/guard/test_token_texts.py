"""The texts of tokens make up the text, whatever characters the tokens are cut through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.models import LoadedModel
from guard.token_texts import TokenTexts, token_texts

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BROKEN = st.text("\ufffda你🙂é", max_size=40)


@given(text=ANY | BROKEN)
def test_texts_of_tokens_make_up_the_text(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text)["input_ids"]
    texts = token_texts(ids, tiny_tokenizer.decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


@given(text=ANY)
def test_a_character_stands_where_it_is_complete(tiny_tokenizer: Any, text: str) -> None:
    """The tiny tokenizer has a token for every byte."""
    text = text.replace("\ufffd", "?")
    expected = [piece for c in text for piece in (*[""] * (len(c.encode()) - 1), c)]
    assert token_texts(tiny_tokenizer(text)["input_ids"], tiny_tokenizer.decode) == expected


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_have_a_text_each_all_the_same(tiny_tokenizer: Any, data: bytes) -> None:
    ids = [int(byte) + 3 for byte in data]
    texts = token_texts(ids, tiny_tokenizer.decode)
    assert len(texts) == len(ids)


@given(text=ANY | BROKEN, size=st.integers(0, 20))
def test_what_comes_later_moves_nothing(tiny_tokenizer: Any, text: str, size: int) -> None:
    ids = tiny_tokenizer(text)["input_ids"]
    stream = TokenTexts(tiny_tokenizer.decode)
    early = [piece for token in ids[:size] for piece in stream.push(token)]
    assert token_texts(ids, tiny_tokenizer.decode)[: len(early)] == early


def test_the_time_grows_with_the_text_and_no_faster(tiny_tokenizer: Any) -> None:
    for text in ("\ufffd" * 1300, "a" * 4000):
        decoded = 0

        def decode(ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            found: str = tiny_tokenizer.decode(ids)
            return found

        ids = tiny_tokenizer(text)["input_ids"]
        token_texts(ids, decode)
        assert decoded < 40 * len(ids)


@pytest.mark.parametrize(
    "text", ["你好 🙂 wörld \ufffd don't .", "\ufffd" * 7 + "你好" + "\ufffd" * 20 + "🙂", " 東京"]
)
def test_texts_of_the_embedded_models_tokens_make_up_the_text(embedded: LoadedModel, text: str) -> None:
    ids = embedded.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, embedded.tokenizer.decode)
    assert "".join(texts) == text
    assert embedded.tokenizer.decode(ids[:1]) == "\ufffd" or texts[0]

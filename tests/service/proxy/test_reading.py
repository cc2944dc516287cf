"""The proxy's parts alone: events out of bytes, texts out of JSON."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.proxy_events import EventReader, LineTooLongError
from service.proxy_texts import answer_texts, read_chat, read_completion


@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=5
    ),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_events_are_read_the_same_however_their_bytes_are_cut(texts: list[str], newline: str, cuts: list[int]) -> None:
    data = "".join(f": skipped{newline}id: 1{newline}data: {text}{newline}{newline}" for text in texts).encode()
    reader, found, start, turn = EventReader(10_000), [], 0, 0
    while start < len(data):
        size = cuts[turn % len(cuts)]
        found += reader.feed(data[start : start + size])
        start, turn = start + size, turn + 1
    assert found == texts
    assert reader.end() is None


def test_lines_of_one_event_are_joined_and_a_last_empty_line_may_be_missing() -> None:
    reader = EventReader(100)
    assert reader.feed(b"\xef\xbb\xbfdata:a\ndata: b\n\ndata\nevent: x\n\ndata: c") == ["a\nb"]
    assert reader.end() == "c"


@pytest.mark.parametrize("data", [b"data: " + b"x" * 200, b"data: x\n" * 100])
def test_an_event_is_of_bounded_length(data: bytes) -> None:
    with pytest.raises(LineTooLongError):
        EventReader(100).feed(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(content=st.text(min_size=1).filter(str.strip), extra=st.dictionaries(st.text(min_size=1), JSON, max_size=3))
def test_every_text_of_a_message_is_found_whatever_stands_beside_it(content: str, extra: dict[str, Any]) -> None:
    message = {**extra, "role": "user", "content": content}
    asked = read_chat({"messages": [message]})
    assert content in asked.texts
    assert len(asked.texts) == len(asked.roles)
    nested = read_completion({"prompt": "a", "odd": {"deep": [{"odder": content}]}})
    assert content in nested.texts
    assert any(content in text for text in answer_texts({"message": {"odd": [{"deep": content}]}}))

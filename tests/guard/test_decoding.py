"""Sampling keeps to the nucleus and its seed; shown text has no half characters and nothing beyond a stop sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guard.engines.decoding import Sampler, TextStream


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(50)
    assert Sampler(temperature=0.0, top_p=1.0, seed=None).next_token(logits) == int(logits.argmax())


def test_same_seed_gives_the_same_tokens_and_leaves_the_global_generator_alone() -> None:
    logits = torch.randn(50)
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        sampler = Sampler(temperature=1.0, top_p=1.0, seed=seed)
        runs.append([sampler.next_token(logits) for _ in range(30)])
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


@given(seed=st.integers(0, 99), top_p=st.floats(0.0, 0.99))
def test_only_the_nucleus_is_sampled(seed: int, top_p: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed)) * 2
    ordered, order = logits.softmax(0).sort(descending=True)
    size = max(1, int((ordered.cumsum(0) - ordered < top_p).sum()))
    sampler = Sampler(temperature=1.0, top_p=top_p, seed=seed)
    assert {sampler.next_token(logits) for _ in range(40)} <= set(order[:size].tolist())


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_comes_out_whole_without_half_characters(tiny_tokenizer: Any, text: str) -> None:
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.push(token) for token in tiny_tokenizer(text)["input_ids"]]
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + stream.flush() == text


@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_from_the_first_stop_sequence_on_is_shown(tiny_tokenizer: Any, text: str, stops: list[str]) -> None:
    stream = TextStream(tiny_tokenizer, stops)
    shown = ""
    for token in tiny_tokenizer(text)["input_ids"]:
        shown += stream.push(token)
        if stream.stopped:
            break
    ends = [
        min(at for stop in stops if (at := text[:n].find(stop)) >= 0)
        for n in range(len(text) + 1)
        if any(stop in text[:n] for stop in stops)
    ]
    assert stream.stopped == bool(ends)
    assert shown + stream.flush() == (text[: ends[0]] if ends else text)


@pytest.mark.parametrize("ids", [[], [0x80 + 3]])
def test_incomplete_character_is_shown_at_the_end(tiny_tokenizer: Any, ids: list[int]) -> None:
    stream = TextStream(tiny_tokenizer)
    for token in ids:
        stream.push(token)
    assert stream.flush() == tiny_tokenizer.decode(ids)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures_are_sampled(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    token = Sampler(temperature=temperature, top_p=0.9, seed=0).next_token(logits)
    assert token == 1 or temperature > 1


def test_special_tokens_are_not_shown(tiny_tokenizer: Any) -> None:
    stream = TextStream(tiny_tokenizer)
    pieces = [stream.push(token) for token in [1, *tiny_tokenizer("hi")["input_ids"], 2]]
    assert "".join(pieces) + stream.flush() == "hi"

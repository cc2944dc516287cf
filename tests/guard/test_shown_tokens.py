"""An observer is told of exactly the tokens whose text has been shown, each once and in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.engines.decoding import TextStream
from guard.events import SequenceReport, StreamEvent, TraceToken, Verdict
from guard.generation import Generation, GenerationOptions
from guard.shown_tokens import ShownTokens

REFUSAL = "REFUSED"


def token(index: int, token_id: int = 0) -> TraceToken:
    return TraceToken(index=index, token_id=token_id, text="", observed=True, scores={}, features=())


class Reader:
    """Keeps what is told, and with each event the text that had been told before it."""

    def __init__(self) -> None:
        self.prompts: list[Sequence[TraceToken]] = []
        self.tokens: list[TraceToken] = []
        self.events: list[StreamEvent] = []

    def prompt(self, tokens: Sequence[TraceToken]) -> None:
        assert not self.events, "the prompt comes first"
        self.prompts.append(tokens)

    def token(self, token: TraceToken) -> None:
        self.tokens.append(token)

    def heard(self, event: Any) -> None:
        self.events.append(event)
        if event.finish_reason is None:
            assert self.shown.startswith(self.told), "a token is told before its text is shown"

    @property
    def shown(self) -> str:
        return "".join(event.text for event in self.events if event.finish_reason != "content_filter")

    @property
    def told(self) -> str:
        return "".join(token.text for token in self.tokens)


def report(action: Any) -> SequenceReport:
    return SequenceReport(
        request_id="r",
        action=action,
        verdicts=(),
        prompt_scores={},
        response_scores={},
        tokens_generated=0,
        tokens_observed=0,
    )


@given(
    text=st.text("abc 你🙂\ufffd", max_size=30),
    stops=st.lists(st.text("abc你", min_size=1, max_size=3), max_size=2),
    hold=st.integers(0, 12),
    strides=st.lists(st.integers(1, 4), min_size=1, max_size=40),
    deciding=st.integers(0, 80) | st.none(),
    special=st.sets(st.integers(0, 40), max_size=3),
)
def test_tokens_told_are_those_whose_text_was_shown(
    tiny_tokenizer: Any,
    text: str,
    stops: list[str],
    hold: int,
    strides: list[int],
    deciding: int | None,
    special: set[int],
) -> None:
    """An answer as the manager tells of it: some tokens at a time, held back at first, and perhaps blocked."""
    ids = tiny_tokenizer(text)["input_ids"]
    for place in sorted(special, reverse=True):
        ids.insert(min(place, len(ids)), 1)
    blocked = deciding is not None and deciding < len(ids)
    reader = Reader()
    options = GenerationOptions(max_new_tokens=100, stop=tuple(stops))
    generation = Generation(tiny_tokenizer, options, REFUSAL, reader.heard, reader)
    assert generation.tokens is not None
    generation.tokens.prompt([token(0)])
    read, no_verdicts = 0, list[Verdict]()
    stopped = False
    for stride in [*strides, len(ids)]:
        for _ in range(stride):
            if read < len(ids):
                generation.tokens.token(token(read, ids[read]))
                read += 1
            if blocked and deciding is not None and read == deciding + 1:
                break
        at_end = blocked and deciding is not None and read > deciding
        may_show = read >= hold and not at_end
        stopped = generation.advance(ids[:read], no_verdicts, may_show)
        if stopped or at_end or read == len(ids):
            break
    generation.end(ids[:read], True, report("block" if blocked and not stopped else "allow"), None)
    assert len(reader.prompts) == 1
    assert [known.index for known in reader.tokens] == list(range(len(reader.tokens)))
    assert [known.token_id for known in reader.tokens] == ids[: len(reader.tokens)]
    if reader.events[-1].finish_reason == "content_filter":
        assert deciding is not None
        assert len(reader.tokens) <= deciding
        assert reader.shown.startswith(reader.told)
        assert REFUSAL not in reader.told
    else:
        assert reader.told == reader.shown
        cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        if cut is None:
            assert len(reader.tokens) == len(ids)


def test_without_an_observer_nothing_is_kept(tiny_tokenizer: Any) -> None:
    generation = Generation(tiny_tokenizer, GenerationOptions(max_new_tokens=3), REFUSAL, lambda _: None)
    assert generation.tokens is None


def test_a_token_that_a_stop_sequence_cuts_is_told_up_to_it() -> None:
    reader = Reader()
    tokens = ShownTokens(reader)
    for index in range(3):
        tokens.token(token(index))
    tokens.show("ab", ["a", "bcd", "e"])
    assert reader.told == "a"
    tokens.show("c", ["a", "bcd", "e"], last=True)
    assert [known.text for known in reader.tokens] == ["a", "bc"]


@pytest.mark.parametrize("fails", ["prompt", "token"])
def test_an_observer_that_raises_is_told_no_more(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Reader):
        def prompt(self, tokens: Sequence[TraceToken]) -> None:
            super().prompt(tokens)
            assert fails != "prompt", "injected"

        def token(self, token: TraceToken) -> None:
            super().token(token)
            raise ValueError("injected")

    reader = Broken()
    tokens = ShownTokens(reader)
    tokens.prompt([token(0)])
    tokens.token(token(0))
    tokens.token(token(1))
    tokens.show("ab", ["a", "b"])
    assert len(reader.prompts) == 1
    assert len(reader.tokens) == (fails == "token")
    assert "traced no further" in caplog.text


@given(text=st.text("ab你🙂\ufffd", max_size=30))
def test_pieces_of_a_stream_make_up_its_text(tiny_tokenizer: Any, text: str) -> None:
    stream = TextStream(tiny_tokenizer)
    ids = tiny_tokenizer(text)["input_ids"]
    shown = "".join(stream.push(known) for known in ids) + stream.flush()
    assert "".join(stream.pieces) == shown == text
    assert len(stream.pieces) == len(ids)

"""The simulator that is a language model: from an explanation alone it predicts where the feature fires."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.explain.replies import Answerer, ChatRequest
from training.simulation.prompts import (
    MAX_VALUE,
    PROMPT_BUDGET,
    Form,
    Level,
    batches,
    parse_segment_answer,
    parse_token_answer,
    segment_prompt,
    token_prompt,
)

# Most tokens of an answer: what every answer may take, and more for each item and each of its tokens. About twice what
# the ideal answer takes, for blanks and line breaks.
_ANSWER_TOKENS: dict[str, tuple[int, int, int]] = {"list": (64, 16, 4), "pairs": (64, 16, 12), "segment": (64, 12, 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentText:
    """A segment of the test split as a simulator reads it, and what the feature does on it, which it is not shown."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """The feature's normalised activation on each token."""
    text: str
    """The segment decoded as a whole: a character may be cut between two tokens."""
    document: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a language model predicted for one feature, and what it cost."""

    level: Level
    values: tuple[int | None, ...]
    """For each token (0 to 10) or segment (0 or 1), over all segments in order; None: no usable answer."""
    requests: int
    prompt_tokens: int
    completion_tokens: int
    complete: bool = True
    """False if some requests were not sent, because the endpoint is offline."""

    @property
    def tokens(self) -> int:
        """Prompts and answers together, whenever they were paid for."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def missing(self) -> int:
        """Tokens or segments without a usable answer."""
        return sum(value is None for value in self.values)


class LlmSimulator:
    """Predicts through a chat endpoint, at the level of tokens or of segments.

    form: of the answers token by token (see `token_prompt`). budget: tokens of one request, prompt and answer, by
    estimate; the same for both levels.
    """

    def __init__(
        self,
        endpoint: Answerer,
        *,
        form: Form = "list",
        budget: int = PROMPT_BUDGET,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.form: Form = form
        self.budget = budget
        self._report = report

    def requests(self, level: Level, explanation: str, segments: Sequence[SegmentText]) -> list[ChatRequest]:
        """The questions about one feature, each on the segments of one range of `ranges`."""
        found = []
        for rows in self.ranges(level, segments):
            chosen = [segments[row] for row in rows]
            request, item, token = _ANSWER_TOKENS[self.form if level == "token" else "segment"]
            messages = (
                token_prompt(explanation, [segment.tokens for segment in chosen], form=self.form)
                if level == "token"
                else segment_prompt(explanation, [segment.text for segment in chosen])
            )
            limit = request + sum(item + token * len(segment.tokens) for segment in chosen)
            found.append(ChatRequest(messages=messages, max_answer=limit))
        return found

    def ranges(self, level: Level, segments: Sequence[SegmentText]) -> list[range]:
        """Which segments share a request."""
        return batches([len(segment.tokens) for segment in segments], level, form=self.form, budget=self.budget)

    def simulate(
        self, level: Level, explanations: Mapping[str, str], segments: Mapping[str, Sequence[SegmentText]]
    ) -> dict[str, Simulation]:
        """Predictions by feature id, for every feature that has an explanation and segments.

        Raises what `ChatEndpoint.ask_all` raises.
        """
        asked = {
            id_: self.requests(level, text, segments[id_]) for id_, text in explanations.items() if id_ in segments
        }
        replies = iter(self.endpoint.ask_all([r for requests in asked.values() for r in requests], report=self._report))
        found: dict[str, Simulation] = {}
        for id_, requests in asked.items():
            given = [next(replies) for _ in requests]
            values: list[int | None] = []
            for rows, reply in zip(self.ranges(level, segments[id_]), given, strict=True):
                values += _parse(level, reply.text, [len(segments[id_][row].tokens) for row in rows])
            found[id_] = Simulation(
                level=level,
                values=tuple(values),
                requests=len(requests),
                prompt_tokens=sum(reply.prompt_tokens for reply in given),
                completion_tokens=sum(reply.completion_tokens for reply in given),
                complete=all(reply.status != "not_asked" for reply in given),
            )
        return found


def truths(level: Level, segments: Sequence[SegmentText]) -> tuple[int, ...]:
    """What the feature does on each token or segment, graded from 0 to 10: min(10, floor(10 * activation)).

    Activations are normalised; a segment's is the highest of its tokens.
    """
    if level == "token":
        return tuple(_grade(activation) for segment in segments for activation in segment.activations)
    return tuple(_grade(max(segment.activations, default=0.0)) for segment in segments)


def correlation(predicted: Sequence[int | None], true: Sequence[int]) -> float | None:
    """Pearson's correlation over what was predicted; None if fewer than two were, or either side does not vary."""
    pairs = [(p, t) for p, t in zip(predicted, true, strict=True) if p is not None]
    if len(pairs) < 2:
        return None
    a, b = np.asarray(pairs, dtype=np.float64).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _parse(level: Level, text: str, lengths: Sequence[int]) -> list[int | None]:
    if level == "segment":
        return parse_segment_answer(text, len(lengths))
    return [value for row in parse_token_answer(text, lengths) for value in row]


def _grade(activation: float) -> int:
    return min(MAX_VALUE, max(0, int(10 * activation)))

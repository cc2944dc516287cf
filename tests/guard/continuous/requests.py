"""What the tests of continuous batching share: ways to run requests, with the guard or beside it, and their reports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from guard.errors import GuardError
from guard.events import SequenceReport, StreamEvent
from guard.serving import Generation, GenerationOptions, ServingGuard
from guard.session import AttachedGuard
from tests.guard.generation import END, assert_same_report

STEER = {"domain": "violence", "action": "steer", "scope": ["prompt"], "steer": {"op": "add", "strength": 5.0}}
CHATS = [[{"role": "user", "content": text}] for text in ("Hello", "What is the capital of Peru?", "x", "A bird. " * 9)]
JOIN = 30.0  # seconds that a test waits for a thread before it gives up


def greedy(tokens: int, **options: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=END, pad_token_id=END, **options)


def batching(**options: Any) -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**{"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128, **options})


def run(model: Any, prompts: list[list[int]], tokens: int = 12, **options: Any) -> list[list[int]]:
    """The answers of `generate_batch`, in the order of the prompts."""
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(12),
        continuous_batching_config=batching(**options),
        max_new_tokens=tokens,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    assert [output.prompt_ids for output in outputs.values()] == prompts
    return [output.generated_tokens for output in outputs.values()]


def run_together(model: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """The outputs of requests that are all waiting when the first pass begins, so that every run cuts passes alike."""
    manager = model.init_continuous_batching(
        generation_config=greedy(12), continuous_batching_config=batching(**{"max_batch_tokens": 512, **options})
    )
    names = manager.add_requests(prompts)
    manager.start()
    try:
        seen = Streamed(manager)
        seen.gather(lambda: len(seen.finished) == len(prompts))
    finally:
        manager.stop()
    return [seen.finished[name] for name in names]


def one_by_one(
    guard: AttachedGuard, prompts: list[list[int]], tokens: int = 12
) -> tuple[list[Any], list[SequenceReport]]:
    """Answers and reports of `generate`, a prompt at a time."""
    answers, reports = [], []
    for prompt in prompts:
        output = guard.model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        row = output[0, len(prompt) :].tolist()
        answers.append(row[: row.index(END)] if END in row else row)
        reports += guard.reports
    return answers, reports


def median_cut(reports: list[SequenceReport], phase: str) -> float:
    """A probability of violence that half of the sequences reach."""
    scores = sorted(getattr(report, f"{phase}_scores")["violence"] for report in reports)
    half = len(scores) // 2
    assert scores[half - 1] < scores[half]
    return (scores[half - 1] + scores[half]) / 2


def assert_same_reports(mine: list[SequenceReport], others: list[SequenceReport]) -> None:
    for a, b in zip(mine, others, strict=True):
        assert_same_report(a, b)


class Streamed:
    """A manager whose outputs are gathered as they come."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.outputs: dict[str, list[list[int]]] = {}
        self.finished: dict[str, Any] = {}

    def gather(self, until: Callable[[], bool]) -> None:
        for _ in range(int(JOIN / 0.2)):
            if until():
                return
            output = self.manager.get_result(timeout=0.2)
            if output is not None:
                self.outputs.setdefault(output.request_id, []).append(list(output.generated_tokens))
                if output.is_finished():
                    self.finished[output.request_id] = output
        raise AssertionError(f"only {sorted(self.finished)} have finished")


class Heard:
    """The events of one answer, as they were told."""

    def __init__(
        self, serving: ServingGuard, chat: Any, tokens: int = 20, observer: Any = None, **options: Any
    ) -> None:
        self.events: list[StreamEvent] = []
        self.error: GuardError | None = None
        self.ended = threading.Event()
        wanted = GenerationOptions(max_new_tokens=tokens, **options)
        self.generation: Generation = serving.generate(serving.prompt_ids(chat), wanted, self._hear, observer)

    def _hear(self, event: StreamEvent | GuardError) -> None:
        assert not self.ended.is_set(), "something was told after the end"
        if isinstance(event, GuardError):
            self.error = event
        else:
            self.events.append(event)
        if self.error is not None or self.events[-1].finish_reason is not None:
            self.ended.set()

    def wait(self) -> Heard:
        assert self.ended.wait(JOIN), "the answer did not end"
        assert self.error is None
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def reason(self) -> str | None:
        return self.events[-1].finish_reason

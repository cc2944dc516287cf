"""An engine without a model: texts whose activations are known beforehand, read in passes that a test cuts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from guard.capture import truncated_forward
from guard.engines.judging import Judging
from guard.engines.vllm.programs import Batch, RuleKey
from guard.engines.vllm.watch import News, Sampling, Slots, Watch
from guard.events import SequenceReport
from guard.metrics import Metrics
from guard.monitor import Monitor
from guard.policy import Policy
from guard.reports import make_report
from tests.factories import HOOKS, make_tiny_model
from tests.guard.conftest import MakeBank

CPU = torch.device("cpu")
BLOCK_SIZE = 4


class Text(NamedTuple):
    """A prompt, what the model answers to it, and one token more, which is sampled and read by nobody."""

    ids: list[int]
    prompt: int
    hidden: dict[str, torch.Tensor]

    @property
    def limit(self) -> int:
        return len(self.ids) - self.prompt


class Told(NamedTuple):
    """All that the watch has said of one request."""

    report: dict[str, Any]
    release: list[int]
    steer: list[tuple[int, list[RuleKey]]]


MakeJudging = Callable[..., Judging]


@pytest.fixture(scope="session")
def texts() -> dict[str, Text]:
    """Ten texts of unequal length with special tokens within; a and b begin alike."""
    model, generator = make_tiny_model(), np.random.default_rng(3)
    found = {}
    begin: list[int] = []
    for number, name in enumerate("abcdefghij"):
        ids = [int(t) for t in generator.integers(3, 260, 40 + 3 * number)]
        ids[0], ids[7], ids[8] = 1, 2, 1
        ids[-9] = 1  # within the answer
        if name == "a":
            begin = ids[:17]
        if name == "b":
            ids[:17] = begin
        hidden = truncated_forward(model, HOOKS, torch.tensor([ids]))
        found[name] = Text(ids, 20 + 2 * number, {hook: x[0] for hook, x in hidden.items()})
    return found


@pytest.fixture
def judging_of(bank_of: MakeBank, tiny_tokenizer: Any) -> MakeJudging:
    """`judging_of(policy, violence=True, ...)`."""

    def make(policy: Policy, **bank: Any) -> Judging:
        return Judging(Monitor(bank_of(**bank), policy, CPU), tiny_tokenizer, Metrics())

    return make


def alone(judging: Judging, text: Text) -> SequenceReport:
    """The report of a text that has a state of its own and is judged token by token."""
    monitor = judging.monitor
    state = monitor.begin(["alone"])
    acts = torch.cat([monitor.encoder.encode({k: x[i : i + 1] for k, x in text.hidden.items()}) for i in span(text)])
    judging.judge_prompt_acts(state, 0, text.ids[: text.prompt], acts[: text.prompt])
    for at in range(text.prompt, len(text.ids) - 1):
        if not state.blocked[0] and text.ids[at] not in judging.special:
            monitor.observe_rows(state, np.array([0]), acts[at : at + 1])
    if not state.blocked[0]:
        monitor.finish(state)
    state.generated = state.observed
    return make_report(monitor, state, 0)


def span(text: Text) -> range:
    return range(len(text.ids))


class Engine:
    """Reads texts in passes; as vLLM does, a request whose known tokens have all been read samples one."""

    def __init__(self, watch: Watch, texts: Mapping[str, Text], blocks: Mapping[str, Sequence[int]] | None = None):
        self.watch = watch
        self.texts = dict(texts)
        self.blocks = blocks
        self.at: dict[str, int] = {}
        self.sampled: dict[str, int] = {}
        self.running: list[str] = []
        self.told: dict[str, Told] = {}
        self.errors: dict[str, int] = {}
        self.blocked: list[str] = []

    def join(self, *names: str, tenant: str = "", ends: frozenset[int] = frozenset(), cached: int = 0) -> None:
        for name in names:
            text = self.texts[name]
            sampling = Sampling(ends=ends, limit=text.limit)
            self.watch.join(name, tenant, text.ids[: text.prompt], sampling)
            self.at[name], self.sampled[name] = cached, 0
            self.told[name] = Told({}, [], [])
            self.running.append(name)

    def left(self, name: str) -> int:
        """Tokens that are known and not read."""
        return self.texts[name].prompt + self.sampled[name] - self.at[name]

    def preempt(self, name: str) -> None:
        self.at[name] = 0

    def step(self, parts: Mapping[str, int]) -> News:
        """One pass, of so many tokens of each request, and what it samples."""
        names = list(parts)
        spans = {name: slice(self.at[name], self.at[name] + n) for name, n in parts.items()}
        ids = [token for name, where in spans.items() for token in self.texts[name].ids[where]]
        seen = {hook: torch.cat([self.texts[n].hidden[hook][where] for n, where in spans.items()]) for hook in HOOKS}
        first = np.array([where.start for where in spans.values()])
        batch = Batch(names, np.cumsum([0, *parts.values()]), first, np.array(ids))
        self.watch.observe(batch, seen, self._slots(spans))
        tokens: list[list[int]] = []
        for name, n in parts.items():
            self.at[name] += n
            ready = self.left(name) == 0
            tokens.append([self.texts[name].ids[self.at[name]]] if ready else [])
            self.sampled[name] += ready
        self.watch.sampled(names, tokens)
        return self.take(self.watch.take_news())

    def take(self, news: News) -> News:
        for name, release in news.release.items():
            self.told[name].release.append(release)
        for name, order in news.steer.items():
            self.told[name].steer.append(order)
        for name, report in news.reports.items():
            assert not self.told[name].report, "a request is reported on once"
            self.told[name].report.update(report)
            self.running.remove(name)
        for kind, count in news.errors.items():
            self.errors[kind] = self.errors.get(kind, 0) + count
        self.blocked += news.blocked
        return news

    def run(self, chunk: int = 1000) -> None:
        """Read all that has joined to its end, every prompt in chunks of so many tokens."""
        for _ in range(2000):
            if not self.running:
                return
            self.step({name: min(chunk, self.left(name)) for name in self.running})
        raise AssertionError(f"{self.running} do not end")

    def report(self, name: str) -> SequenceReport:
        return SequenceReport.from_dict(self.told[name].report["report"])

    def _slots(self, spans: Mapping[str, slice]) -> Slots | None:
        if self.blocks is None:
            return None
        rows = [
            self.blocks[name][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
            for name, where in spans.items()
            for at in range(where.start, where.stop)
        ]
        tables = np.zeros((len(spans), max(len(self.blocks[name]) for name in spans)), dtype=np.int32)
        for i, name in enumerate(spans):
            tables[i, : len(self.blocks[name])] = self.blocks[name]
        return Slots(np.array(rows), tables, BLOCK_SIZE)

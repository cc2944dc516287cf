"""A deterministic engine for tests of the HTTP side, and a real server around it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient

from feature_bank.bank import Bank, Rows, save_bank, shipped_bank_path
from feature_bank.identity import identify
from feature_bank.schema import Calibration, Evidence, FeatureRecord, HeadRecord, Heads, Pooling
from feature_bank.spool_acts import Acts
from guard.errors import GuardError
from guard.events import FeatureHit, SequenceReport, StreamEvent, TextScore, Trace, TraceToken, Verdict
from guard.metrics import Metrics
from guard.policy import Policy
from service.app import create_app, make_server
from service.errors import ApiError
from service.settings import Settings

MODEL_ID = "tiny-guarded"
REFUSAL = "I cannot help with that."
DOMAINS = ("pornography", "politics", "violence", "terror")
PATIENCE = 10.0
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def write_bank(tiny_model: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Writes a bank for the tiny model whose violence head is always sure."""

    def write(
        folder: Path,
        *,
        explanation: str = "always on",
        canary: float = 1.0,
        identity: dict[str, Any] | None = None,
        evidence_tokens: int = 2,
    ) -> Path:
        """A bank of two features: one is 1 on every token, one never fires. `identity` alters the model's."""
        width = tiny_model.config.hidden_size
        features = [
            FeatureRecord(
                id=f"L1/{index}",
                hook_name=HOOK,
                layer=1,
                index=index,
                domains=domains,
                explanation=text,
                scores=scores,
                threshold=0.5,
                scale=1.0,
                density=density,
                evidence=[Evidence(text="a bird", peak="bird", activation=1.0)],
            )
            for index, (text, domains, scores, density) in enumerate(
                (
                    ("never on", ["politics"], {"auroc_politics": 0.6}, 0.0),
                    (explanation, ["violence"], {"auroc_violence": 0.9}, 1.0),
                )
            )
        ]
        heads = {
            domain: HeadRecord(
                features=["L1/1"],
                weights=[0.1],
                bias=5.0 if domain == "violence" else -5.0,
                calibration=Calibration(slope=1.0, intercept=0.0),
                thresholds={"0.01": 0.5},
                streaming_thresholds={"0.01": 0.5},
                steering=[0.0],
            )
            for domain in DOMAINS
        }
        hook = {
            "hook_name": HOOK,
            "d_in": width,
            "d_sae": 8,
            "n_selected": 2,
            "sae_sha256": hashlib.sha256(b"").hexdigest(),
            "fvu": 0.1,
            "l0": 1.0,
            "dead_fraction": 0.0,
            "fires_precision": 1.0,
            "fires_recall": 1.0,
        }
        pooling = Pooling(window=8, min_tokens=1, ceiling=2.0, evidence_tokens=evidence_tokens)
        save_bank(
            folder,
            manifest={
                "name": "tiny",
                "version": "1",
                "created": "2024-01-01",
                "tool_version": "0",
                "model": identify(tiny_model, tiny_tokenizer, "tiny").model_dump() | (identity or {}),
                "hook_points": [hook],
                "corpus": [],
                "canary": {"text": "a small bird", "activations": {"L1/1": canary}, "tolerance": 0.1},
            },
            features=features,
            heads=Heads(pooling=pooling, heads=heads),
            rows={
                HOOK: Rows(
                    W_enc=np.zeros((width, 2), np.float32),
                    W_dec=np.ones((2, width), np.float32),
                    b_enc=np.array([0.0, 1.0], np.float32),
                    threshold=np.full(2, 0.5, np.float32),
                )
            },
        )
        return folder

    return write


@pytest.fixture
def bank(tmp_path: Path, write_bank: Callable[..., Path]) -> Path:
    """A bank for the tiny model, as `write_bank` makes it."""
    return write_bank(tmp_path / "bank")


@pytest.fixture
def model(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The folder of the tiny model and its tokenizer."""
    folder = tmp_path / "tiny"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def shipped_bank() -> Bank:
    """The bank that comes with the package, read once."""
    return Bank.load(shipped_bank_path())


class FakeGeneration:
    """One answer of the fake engine, spoken by a thread of its own."""

    def __init__(self) -> None:
        self.report: SequenceReport | None = None
        self.cancelled = threading.Event()
        self.prompted = False
        self.kept = False
        self.over = False


class FakeEngine:
    """Answers with the words of the last message, one a step; a few words steer it.

    `BLOCK` ends the answer as a guard does, `CRASH` fails, `WAIT` lets the step wait for `go`. What steers an answer is
    said before it.
    It fails the test when two threads judge at once.
    """

    model_id = MODEL_ID
    bank_version = "bank-1"
    policy_version = "policy-1"
    context_length = 64
    generates = True

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.bank = shipped_bank()
        self.policy = Policy.default()
        self.go = threading.Event()
        self.started = threading.Semaphore(0)
        self.calls: list[dict[str, Any]] = []
        self.chats: list[list[dict[str, str]]] = []
        self.batches: list[list[str]] = []
        self.streams_ended = 0
        self.steps = 0
        self.overlapped = False
        self.closed = False
        self._busy = threading.Lock()
        self._words: dict[tuple[int, ...], list[str]] = {}
        self._spelled: dict[int, str] = {}

    def close(self) -> None:
        self.closed = True

    def reloaded(self, bank: Path | None, policy: Path | None) -> FakeEngine:
        return self

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
            raise AssertionError("two threads are inside the engine")
        try:
            yield
        finally:
            self._busy.release()

    def verdict(self, action: Any = "block", domain: str = "violence") -> Verdict:
        hit = FeatureHit(id="L15/7", layer=15, explanation="a weapon", activation=1.5, contribution=2.0)
        return Verdict(
            request_id="r1",
            phase="response",
            token_index=3,
            domain=domain,
            score=0.97,
            threshold=0.9,
            action=action,
            rule=domain,
            features=(hit,),
            bank_version=self.bank_version,
            policy_version=self.policy_version,
        )

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        with self._alone():
            if any(message["content"] == "TEMPLATE" for message in messages):
                raise ApiError(400, "The model's chat template refuses these messages.", param="messages")
            self.chats.append([dict(message) for message in messages])
            return self._ids([word for message in messages for word in message["content"].split()], messages[-1])

    def text_ids(self, text: str) -> list[int]:
        with self._alone():
            return self._ids(text.split(), {"content": text})

    def _ids(self, words: list[str], last: Mapping[str, str]) -> list[int]:
        ids = [zlib.crc32(word.encode()) for word in words]
        self._words[tuple(ids)] = last["content"].split()
        self._spelled.update(zip(ids, words, strict=True))
        return ids

    def generate(
        self, ids: Sequence[int], options: Any, heard: Callable[[Any], None], observer: Any = None, keeper: Any = None
    ) -> FakeGeneration:
        self.calls.append({name: getattr(options, name) for name in options.__dataclass_fields__})
        generation = FakeGeneration()
        words = [*options.steer, *self._words[tuple(ids)]][: options.max_new_tokens]

        def speak() -> None:
            self.started.release()
            try:
                for event in self._events(words, options.max_new_tokens, generation):
                    if generation.cancelled.is_set():
                        return
                    if keeper is not None:
                        self._keep(keeper, ids, event, generation)
                    if observer is not None:
                        self._observe(observer, ids, event, generation)
                    heard(event)
            except RuntimeError as error:
                heard(GuardError(str(error)))
            finally:
                self.streams_ended += 1

        threading.Thread(target=speak, name="fake-generation", daemon=True).start()
        return generation

    def _keep(self, keeper: Any, ids: Sequence[int], event: StreamEvent, generation: FakeGeneration) -> None:
        """Give the prompt with the first event, and each token, the blocked one included; special tokens are none."""
        if not generation.kept:
            generation.kept = True
            keeper.prompt(np.zeros(len(ids), dtype=np.int64), self.acts(len(ids)))
        if not generation.over and (event.token_id is not None or event.verdicts):
            keeper.token(self.acts(1)[0])
        generation.over = generation.over or event.finish_reason is not None

    def acts(self, tokens: int) -> Any:
        """Activations (T, F), always the same for the same number of tokens."""
        rng = np.random.default_rng(tokens)
        found = rng.random((tokens, len(self.bank.features)), dtype=np.float32)
        return np.where(found > 0.9, found, 0.0).astype(np.float32)

    def _observe(self, observer: Any, ids: Sequence[int], event: StreamEvent, generation: FakeGeneration) -> None:
        """Tell of the prompt with the first event, and of every token with its text."""
        if not generation.prompted:
            generation.prompted = True
            observer.prompt(self._prompt_tokens(ids))
        if event.token_id is not None and event.text:
            observer.token(self._token(event.token_id, event.text, 0.02, 0))

    def cancel(self, generation: FakeGeneration) -> None:
        generation.cancelled.set()

    def check_steering(self, items: Sequence[str]) -> None:
        for item in items:
            if "=" not in item or item.startswith("nothing"):
                raise ApiError(400, f"{item!r} is no steering.", param="steer", code="invalid_value")

    def trace(self, text: str, role: str, *, top: int | None = 5) -> Trace:
        with self._alone():
            words = text.split() if top is not None else re.findall(r"\s*\S+|\s+$", text)
            tokens = [self._token(index, word, 0.01) for index, word in enumerate(words)]
            if top is not None:
                tokens = [replace(token, features=self.verdict().features[:top]) for token in tokens]
            return Trace(tokens=tuple(tokens), score=replace(self._score(text), seen=self._seen(text)))

    def _token(self, index: int, text: str, score: float, segment: int | None = None) -> TraceToken:
        """A token on which a few features of the bank are active, always the same for the same text."""
        first = zlib.crc32(text.encode()) % len(self.bank.features)
        features = tuple(
            FeatureHit(
                id=record.id,
                layer=record.layer,
                explanation=record.explanation,
                activation=1.5 - 0.25 * rank,
                contribution=0.5 - 0.125 * rank,
            )
            for rank, record in enumerate(self.bank.features[first : first + 4])
        )
        return TraceToken(
            index=index,
            token_id=index,
            text=text,
            observed=True,
            scores=dict.fromkeys(DOMAINS, score),
            features=features,
            segment=segment,
        )

    def _prompt_tokens(self, ids: Sequence[int]) -> tuple[TraceToken, ...]:
        """The words of a prompt, after a token of the template."""
        opening = TraceToken(index=0, token_id=0, text="<user>", observed=False, scores={}, features=())
        words = [self._token(i, f" {self._spelled[token]}", 0.01, 1) for i, token in enumerate(ids, 1)]
        return (opening, *words)

    def _events(self, words: list[str], limit: int, generation: FakeGeneration) -> Iterator[StreamEvent]:
        verdicts: tuple[Verdict, ...] = ()
        for number, word in enumerate(words):
            self.steps += 1
            if word == "WAIT":
                deadline = time.monotonic() + PATIENCE
                while not self.go.wait(0.01) and not generation.cancelled.is_set():
                    assert time.monotonic() < deadline, "the test never let the engine go on"
                if generation.cancelled.is_set():
                    return
            elif word == "CRASH":
                raise RuntimeError(f"secret text: {' '.join(words)}")
            elif word == "BLOCK":
                verdicts = (self.verdict(),)
                generation.report = self._report("block", verdicts, number + 1)
                yield StreamEvent(token_id=None, text=REFUSAL, verdicts=verdicts, finish_reason="content_filter")
                # An engine that went on talking must not be heard.
                yield StreamEvent(token_id=9, text="LEAK")
                return
            yield StreamEvent(token_id=number, text=word + " ")
        generation.report = self._report("allow", verdicts, len(words))
        reason: Any = "length" if len(words) == limit else "stop"
        yield StreamEvent(token_id=None, text="", finish_reason=reason)

    def _report(self, action: Any, verdicts: tuple[Verdict, ...], tokens: int) -> SequenceReport:
        return SequenceReport(
            request_id="r1",
            action=action,
            verdicts=verdicts,
            prompt_scores=dict.fromkeys(DOMAINS, 0.01),
            response_scores={**dict.fromkeys(DOMAINS, 0.02), "violence": 0.97 if verdicts else 0.02},
            tokens_generated=tokens,
            tokens_observed=tokens,
        )

    def score(
        self, texts: Sequence[str], roles: Sequence[str], *, keep: Sequence[bool] | None = None
    ) -> list[TextScore]:
        with self._alone():
            self.batches.append(list(texts))
            wanted = [None] * len(texts) if keep is None else keep
            scores = [self._score(text) for text in texts]
            return [
                replace(score, seen=self._seen(text)) if kept or (kept is not None and score.verdicts) else score
                for text, score, kept in zip(texts, scores, wanted, strict=True)
            ]

    def _score(self, text: str) -> TextScore:
        text.encode()  # a lone surrogate would raise here
        flagged = {domain: domain in text for domain in DOMAINS}
        verdicts = tuple(self.verdict("block", domain) for domain in DOMAINS if flagged[domain])
        return TextScore(
            scores={domain: 0.99 if flagged[domain] else 0.01 for domain in DOMAINS},
            flagged=flagged,
            action="block" if verdicts else "allow",
            verdicts=verdicts,
            features={domain: verdict.features for verdict in verdicts for domain in [verdict.domain]},
            tokens=len(text.split()),
            truncated=False,
        )

    def _seen(self, text: str) -> Acts:
        tokens = len(text.split())
        return Acts(np.zeros(tokens, dtype=np.int64), self.acts(tokens))


class ServerThread:
    """A uvicorn server on a free loopback port, in a thread of its own."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.server = make_server(app, settings)
        self._thread = threading.Thread(target=self.server.run, name="uvicorn")

    def __enter__(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + PATIENCE
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server took too long to start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not stop"


@pytest.fixture
def engine(metrics: Metrics) -> FakeEngine:
    return FakeEngine(metrics)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def log() -> io.StringIO:
    """The text of the application's log."""
    return io.StringIO()


@pytest.fixture
def make_app(engine: FakeEngine, log: io.StringIO) -> Callable[..., FastAPI]:
    """Build an application around the fake engine; keyword arguments are settings."""

    def make(served: Any = None, **settings: Any) -> FastAPI:
        logger = structlog.wrap_logger(structlog.PrintLogger(log), processors=[structlog.processors.JSONRenderer()])
        settings = {"port": 0, "allowed_hosts": "testserver", "watch_seconds": 0.0, **settings}
        return create_app(engine if served is None else served, Settings(**settings), logger=logger)

    return make


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_app(), raise_server_exceptions=True) as client:
        yield client


@pytest.fixture
def serve(make_app: Callable[..., FastAPI]) -> Iterator[Callable[..., str]]:
    """Start a real server and return its address; it is stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(served: Any = None, **settings: Any) -> str:
            app = make_app(served, **settings)
            return stack.enter_context(ServerThread(app, app.state.services.settings))

        yield start


@pytest.fixture
def server_thread() -> type[ServerThread]:
    return ServerThread


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """Build a chat request's body."""

    def build(content: Any = "one two three", **options: Any) -> dict[str, Any]:
        return {"model": MODEL_ID, "messages": [{"role": "user", "content": content}], **options}

    return build


@pytest.fixture
def read_events() -> Callable[[str], list[Any]]:
    """Read a stream's events: JSON objects, and "[DONE]" as it is."""

    def read(text: str) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    return read

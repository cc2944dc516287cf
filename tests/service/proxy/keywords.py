"""An engine that judges by words, and what the proxy's tests share."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from feature_bank.bank import Bank
from guard.events import FeatureHit, TextScore, Verdict
from guard.metrics import Metrics
from guard.policy import Policy, Rule, Threshold

PATIENCE = 20.0
REFUSAL = "I cannot help with that."
CHAT = "/v1/chat/completions"
WORD = "volcano"  # blocked
DELICATE = "geyser"  # flagged
CRASH = "meteor"  # the judge fails
ACTIONS: dict[str, Any] = {WORD: "block", DELICATE: "flag"}


@dataclass(frozen=True)
class FakeReleased:
    text: str
    verdicts: tuple[Verdict, ...]
    blocked: bool


class KeywordEngine:
    """Blocks, flags or fails by words. A growing answer is released up to its last whole word."""

    model_id = "keywords"
    bank_version = "bank-1"
    policy_version = "policy-1"
    context_length = 4096
    generates = False

    def __init__(self, metrics: Metrics, on_error: Any = "block") -> None:
        self.metrics = metrics
        self.bank: Bank = None  # type: ignore[assignment]  # the proxy does not look at it
        rule = Rule(domain="violence", threshold=Threshold(probability=0.5), action="block")
        self.policy = Policy(rules=(rule,), refusal=REFUSAL, on_error=on_error)
        self.judged: list[tuple[str, str]] = []
        self.pushed: list[str] = []
        self.opened = 0

    def close(self) -> None:
        pass

    def reloaded(self, bank: Path | None, policy: Path | None) -> KeywordEngine:
        return self

    def verdict(self, word: str, phase: Any) -> Verdict:
        hit = FeatureHit(id="L1/7", layer=1, explanation="a mountain", activation=1.5, contribution=2.0)
        return Verdict(
            request_id="r1",
            phase=phase,
            token_index=0,
            domain="violence",
            score=0.97,
            threshold=0.5,
            action=ACTIONS[word],
            rule="violence",
            features=(hit,),
            bank_version=self.bank_version,
            policy_version=self.policy_version,
        )

    def score(self, texts: Sequence[str], roles: Sequence[Any]) -> list[TextScore]:
        self.judged += zip(texts, roles, strict=True)
        return [
            self._score(text, "response" if role == "response" else "prompt")
            for text, role in zip(texts, roles, strict=True)
        ]

    def _score(self, text: str, phase: Any) -> TextScore:
        if CRASH in text:
            raise RuntimeError(text)
        verdicts = tuple(self.verdict(word, phase) for word in ACTIONS if word in text)
        return TextScore(
            scores={"violence": 0.97 if verdicts else 0.01},
            flagged={"violence": bool(verdicts)},
            action=verdicts[0].action if verdicts else "allow",
            verdicts=verdicts,
            features={},
            tokens=len(text.split()),
            truncated="[cut]" in text,
        )

    def open_response(self) -> KeywordJudge:
        self.opened += 1
        return KeywordJudge(self)


class KeywordJudge:
    def __init__(self, engine: KeywordEngine) -> None:
        self._engine = engine
        self._rest = ""
        self._over = False

    def push(self, text: str, *, last: bool = False) -> FakeReleased:
        assert not self._over, "the judge was asked after the end"
        self._engine.pushed.append(text)
        self._rest += text
        if CRASH in self._rest:
            raise RuntimeError(self._rest)
        self._over = last
        whole = len(self._rest) if last else max(map(len, re.findall(r"^.*\s", self._rest, re.DOTALL)), default=0)
        ready, self._rest = self._rest[:whole], self._rest[whole:]
        verdicts = tuple(self._engine.verdict(word, "response") for word in ACTIONS if word in ready)
        if WORD in ready:
            self._over = True
            return FakeReleased(ready[: ready.index(WORD)], verdicts, blocked=True)
        return FakeReleased(ready, verdicts, blocked=False)


def ask(content: Any = "tell me of lakes", **more: Any) -> dict[str, Any]:
    return {"model": "upstream-model", "messages": [{"role": "user", "content": content}], **more}


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def said(events: Sequence[Any], index: int = 0, name: str = "content") -> str:
    parts = [part for event in events if event != "[DONE]" for part in event.get("choices", ())]
    return "".join(part["delta"].get(name) or "" for part in parts if part["index"] == index)


def finishes(events: Sequence[Any]) -> dict[int, str]:
    parts = [part for event in events if event != "[DONE]" for part in event.get("choices", ())]
    return {part["index"]: part["finish_reason"] for part in parts if part["finish_reason"]}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def call(index: int, **function: str) -> dict[str, Any]:
    return {
        "tool_calls": [
            {
                "index": index,
                **({"id": f"c{index}", "type": "function"} if "name" in function else {}),
                "function": function,
            }
        ]
    }


class Socket:
    """A raw connection: what has arrived is known at any time."""

    def __init__(self, url: str, body: Any, path: str = CHAT) -> None:
        address = httpx.URL(url)
        self._socket = socket.create_connection((address.host, address.port), timeout=PATIENCE)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {address.host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        self.received = b""

    def until(self, text: str) -> None:
        while text.encode() not in self.received:
            piece = self._socket.recv(4096)
            assert piece, f"the connection ended before {text!r} came"
            self.received += piece

    def rest(self) -> str:
        while piece := self._socket.recv(4096):
            self.received += piece
        self.close()
        return self.received.decode()

    def close(self) -> None:
        self._socket.close()

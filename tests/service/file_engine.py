"""An engine without a model: what judges is what lies in files, and every verdict names it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from feature_bank.bank import Bank
from feature_bank.errors import BankError
from guard.errors import PolicyError
from guard.events import FeatureHit, TextScore, Trace, TraceToken, Verdict
from guard.metrics import Metrics
from guard.policy import Policy

PATIENCE = 10.0
RULE = {"domain": "violence", "threshold": {"probability": 0.9}, "action": "flag"}


@dataclass
class World:
    """What all engines of a test share."""

    builds: int = 0
    building: int = 0
    most_building: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    on_build: Callable[[], None] = lambda: None


class FileEngine:
    """Judges every text as violence; the text `WAIT` waits for `go`. It refuses what a real engine refuses."""

    model_id = "file-model"
    context_length = 4096
    generates = False

    def __init__(self, bank: Bank, policy: Policy, metrics: Metrics, world: World) -> None:
        self.bank = bank
        self.policy = policy
        self.metrics = metrics
        self.world = world
        self.closed = False

    @classmethod
    def start(cls, bank: Path, policy: Path | None, metrics: Metrics) -> FileEngine:
        return cls(Bank.load(bank), Policy.default() if policy is None else Policy.load(policy), metrics, World())

    @property
    def bank_version(self) -> str:
        return self.bank.version

    @property
    def policy_version(self) -> str:
        return self.policy.version

    def close(self) -> None:
        self.closed = True

    def reloaded(self, bank: Path | None, policy: Path | None) -> FileEngine:
        world = self.world
        world.builds += 1
        world.building += 1
        world.most_building = max(world.most_building, world.building)
        try:
            new = FileEngine(
                self.bank if bank is None else Bank.load(bank),
                self.policy if policy is None else Policy.load(policy),
                self.metrics,
                world,
            )
            world.on_build()
            if new.bank.manifest.model != self.bank.manifest.model:
                raise BankError("the bank was made for another model", field="model")
            for rule in new.policy.rules:
                if rule.feature is not None and rule.feature not in new.bank.by_id:
                    raise PolicyError(f"{new.policy.where(rule, 'feature')}: the bank has no feature {rule.feature!r}")
            return new
        finally:
            world.building -= 1

    def score(self, texts: Sequence[str], roles: Sequence[str], *, keep: Any = None) -> list[TextScore]:
        return [self._score(text) for text in texts]

    def trace(self, text: str, role: str, *, top: int | None = 5) -> Trace:
        tokens = tuple(
            TraceToken(
                index=i,
                token_id=i,
                text=word,
                observed=True,
                scores={domain: 0.99 if domain == "violence" else 0.01 for domain in self.bank.heads},
                features=(self._hit(),),
            )
            for i, word in enumerate(text.split())
        )
        return Trace(tokens=tokens, score=self._score(text))

    def _score(self, text: str) -> TextScore:
        if text == "WAIT":
            self.world.waiting.set()
            assert self.world.go.wait(PATIENCE), "the test never let the engine go on"
        verdict = Verdict(
            request_id="r1",
            phase="prompt",
            token_index=0,
            domain="violence",
            score=0.99,
            threshold=0.9,
            action="flag",
            rule="violence",
            features=(self._hit(),),
            bank_version=self.bank_version,
            policy_version=self.policy_version,
        )
        return TextScore(
            scores={"violence": 0.99},
            flagged={"violence": True},
            action="flag",
            verdicts=(verdict,),
            features={"violence": (self._hit(),)},
            tokens=len(text.split()),
            truncated=False,
        )

    def _hit(self) -> FeatureHit:
        """A feature whose explanation names the versions that judged."""
        versions = f"{self.bank_version} {self.policy_version}"
        return FeatureHit(id="L1/1", layer=1, explanation=versions, activation=1.0, contribution=1.0)


def policy_text(name: str = "house", **rule: Any) -> str:
    """A policy file with one rule; keyword arguments alter it."""
    return yaml.safe_dump({"name": name, "rules": [{**RULE, **rule}]})


def feature_policy(feature: str, name: str = "featured") -> str:
    """A policy file with one rule, on a feature."""
    rule = {"feature": feature, "threshold": {"activation": 0.5}, "action": "flag"}
    return yaml.safe_dump({"name": name, "rules": [rule]})

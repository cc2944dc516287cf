"""Guards on the tiny model: every test attaches the one it needs, and none is left attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from feature_bank.bank import Bank
from feature_bank.schema import Pooling
from guard.core import Guard
from guard.metrics import Metrics
from guard.policy import Policy
from guard.session import AttachedGuard
from tests.factories import POOLING, make_bank

settings.register_profile("steady", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("steady")

pytest.register_assert_rewrite("tests.guard.generation", "tests.guard.continuous.requests")

MakeBank = Callable[..., Bank]
Attach = Callable[..., AttachedGuard]

VARIED: Mapping[str, None] = {"pornography": None, "politics": None, "violence": None, "terror": None}
"""Every domain's probability depends on the text."""


@pytest.fixture(scope="session")
def banks() -> dict[str, Bank]:
    """The banks made so far; they are immutable, and the tiny model is always the same."""
    return {}


@pytest.fixture
def bank_of(banks: dict[str, Bank], tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> MakeBank:
    """A bank for the tiny model: `bank_of(politics=True, violence=None, ...)`."""

    def make(*, pooling: Pooling = POOLING, **fires: bool | None) -> Bank:
        key = f"{sorted(fires.items())} {pooling}"
        if key not in banks:
            banks[key] = make_bank(tmp_path / "bank", tiny_model, tiny_tokenizer, fires=fires, pooling=pooling)
        return banks[key]

    return make


@pytest.fixture
def attach(bank_of: MakeBank, tiny_model: Any, tiny_tokenizer: Any) -> Iterator[Attach]:
    """Attach a guard with a policy and a bank; the one before it is detached."""
    attached: list[AttachedGuard] = []

    def make(policy: Policy, metrics: Metrics | None = None, **bank: Any) -> AttachedGuard:
        for guard in attached:
            guard.close()
        attached.append(Guard(bank_of(**bank), policy, metrics).attach(tiny_model, tiny_tokenizer))
        return attached[-1]

    yield make
    for guard in attached:
        guard.close()


@pytest.fixture
def prompts(tiny_tokenizer: Any) -> list[str]:
    """Prompts of unequal length."""
    return ["Hello", "What is the capital of Peru, and why?", "x", "Tell me a story about a bird. " * 3]


@pytest.fixture
def batch(tiny_tokenizer: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """The prompts as one left-padded batch."""
    tokens = tiny_tokenizer(prompts, padding=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@pytest.fixture
def chatty(tiny_model: Any) -> Any:
    """The tiny model, made to answer at length: it never ends a sequence of its own accord."""
    original = tiny_model.lm_head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = original(hidden).clone()
        logits[..., :3] = -1e4
        return logits

    tiny_model.lm_head.forward = forward
    return tiny_model

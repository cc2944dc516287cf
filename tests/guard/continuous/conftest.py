"""Six requests for every test of continuous batching, and what the model answers to them; no test leaves a thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guard.core import Guard
from guard.metrics import Metrics
from guard.serving import ServingGuard
from tests.factories import make_policy
from tests.guard.conftest import VARIED, MakeBank
from tests.guard.continuous.requests import run

Serve = Callable[..., ServingGuard]


@pytest.fixture(scope="module", autouse=True)
def fast_collection() -> Iterator[None]:
    """A manager that stops has all garbage collected; what stood before these tests need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]


@pytest.fixture
def ids(tiny_tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Six prompts of unequal length; the last two begin alike."""
    more = ["abcdefghijklmnopqrstuvwxyz" * 2, "abcdefghijklmnopqrstuvwxyz" * 3]
    found: list[list[int]] = tiny_tokenizer([*prompts, *more])["input_ids"]
    return found


@pytest.fixture
def unguarded(chatty: Any, ids: list[list[int]]) -> list[list[int]]:
    """What the model answers without a guard."""
    return run(chatty, ids)


@pytest.fixture
def serve(bank_of: MakeBank, chatty: Any, tiny_tokenizer: Any) -> Iterator[Serve]:
    made: list[ServingGuard] = []

    def make(*rules: Any, metrics: Metrics | None = None, max_concurrent: int = 4, **bank: Any) -> ServingGuard:
        for serving in made:
            serving.close()
        guard = Guard(bank_of(**(bank or VARIED)), make_policy(*rules), metrics)
        made.append(ServingGuard(guard, chatty, tiny_tokenizer, max_concurrent=max_concurrent, cache_tokens=2048))
        return made[-1]

    yield make
    for serving in made:
        serving.close()

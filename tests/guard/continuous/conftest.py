"""Six requests for every test of continuous batching, and what the model answers to them; no test leaves a thread."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.guard.continuous.requests import run


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

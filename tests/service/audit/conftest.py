"""An audit in a file of its own, which is closed when the test ends."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.audit import Audit
from tests.service.audits import Counts, Log

ROOT = Path(__file__).resolve().parents[3]

DAY = 86400.0
PATIENCE = 20.0


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def logged() -> Log:
    return Log()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def opened(path: Path, counts: Counts, logged: Log) -> Iterator[Callable[..., Audit]]:
    """Opens audits in `path`; they are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*, text: bool = False, days: int = 90, file: Path = path) -> Audit:
            audit = Audit.open(file, text=text, days=days, metrics=counts, logger=logged)
            stack.callback(audit.close)
            return audit

        yield make


def connection_of(audit: Audit) -> sqlite3.Connection:
    connection = audit._writer._connection
    assert connection is not None
    return connection


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)

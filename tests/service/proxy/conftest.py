"""A proxy with an engine that judges by words, before an upstream that says what a test wants."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import structlog

from guard.metrics import Metrics
from service.app import create_app
from service.settings import Settings
from tests.service.proxy.keywords import (
    PATIENCE,
    KeywordEngine,
)
from tests.service.upstream_server import UpstreamServer


@pytest.fixture
def upstream() -> Iterator[UpstreamServer]:
    with UpstreamServer() as server:
        yield server


@pytest.fixture
def judge(metrics: Metrics) -> KeywordEngine:
    return KeywordEngine(metrics)


@pytest.fixture
def proxy(
    upstream: UpstreamServer, judge: KeywordEngine, log: io.StringIO, server_thread: Any
) -> Iterator[Callable[..., str]]:
    """Start a proxy before the scripted upstream and return its address; keyword arguments are settings."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> str:
            logger = structlog.wrap_logger(structlog.PrintLogger(log), processors=[structlog.processors.JSONRenderer()])
            given = {"port": 0, "watch_seconds": 0.0, "upstream": upstream.url, "hold_back": 2, **settings}
            made = Settings(**given)
            app: Any = create_app(judge, made, generates=False, logger=logger)
            return str(stack.enter_context(server_thread(app, made)))

        yield start


@pytest.fixture
def client(proxy: Callable[..., str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy(), timeout=PATIENCE) as client:
        yield client

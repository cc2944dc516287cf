"""Failures that may come with every text: the log says what went wrong, seldom enough, and never quotes a text."""

from __future__ import annotations

import math
import time
from typing import Any

from feature_bank.errors import SailguardError

__all__ = ["FailureLog"]

_LOG_SECONDS = 10.0


class FailureLog:
    """Logs the first failure at once and then one line each few seconds, with how many there were; of one thread.

    `logger` is a structlog logger, or None; `message` says what failed.
    """

    def __init__(self, logger: Any, message: str) -> None:
        self._logger = logger
        self._message = message
        self._failures = 0
        self._logged_at = -math.inf

    def add(self, error: Exception, **more: str) -> None:
        """Note a failure; `more` stands beside it in the log."""
        self._failures += 1
        now = time.monotonic()
        if self._logger is not None and now - self._logged_at >= _LOG_SECONDS:
            self._logged_at = now
            self._logger.error(self._message, reason=_reason(error), failures=self._failures, **more)

    def over(self) -> None:
        """Note a success: failures are counted anew."""
        self._failures = 0


def _reason(error: Exception) -> str:
    """What the log may say: the messages of others' errors could quote a text."""
    return str(error) if isinstance(error, SailguardError) else type(error).__name__

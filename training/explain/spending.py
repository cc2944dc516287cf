"""What a run spends on a chat endpoint, and the caps that it cannot pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from feature_bank.errors import SailguardError

MINUTE = 60.0


class EndpointError(SailguardError):
    """An endpoint is misconfigured, gone, or of no use. What it answered before is kept; the message says where."""


class CapReachedError(EndpointError):
    """The next call could pass a cap of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was sent and what it cost."""

    calls: int = 0
    """Requests sent, those that failed included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated_calls: int = 0
    """Those among the calls whose tokens are estimates: the server named none, or its answer never came."""

    @property
    def tokens(self) -> int:
        """Prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Counts calls and tokens, and refuses the call that could pass a cap. Safe to share between threads.

    Before a call its estimated prompt and the longest answer it may get are set aside, so that the caps hold whatever
    comes back, up to the error of the estimate.
    """

    def __init__(self, *, max_calls: int | None, max_tokens: int | None) -> None:
        self.max_calls = max_calls
        self.max_tokens = max_tokens
        self._usage = Usage()
        self._reserved = 0
        self._changed = threading.Condition()

    @property
    def usage(self) -> Usage:
        """What was spent so far."""
        with self._changed:
            return self._usage

    def reserve(self, tokens: int) -> None:
        """Count a call that may take so many tokens. Raises `CapReachedError` instead of passing a cap."""
        with self._changed:
            used = self._usage
            # Calls that are under way may cost less than was set aside for them.
            while self._reserved and self._passes(tokens):
                self._changed.wait()
                used = self._usage
            if self.max_calls is not None and used.calls >= self.max_calls:
                raise CapReachedError(f"the cap of {self.max_calls} calls is reached")
            if self._passes(tokens):
                raise CapReachedError(
                    f"the cap of {self.max_tokens} tokens is reached: {used.tokens} are spent, and the next call may "
                    f"take {tokens}"
                )
            self._reserved += tokens
            self._usage = _add(used, calls=1)

    def settle(self, reserved: int, *, prompt: int = 0, completion: int = 0, estimated: bool = False) -> None:
        """Put what a call took in the place of what was set aside for it."""
        with self._changed:
            self._reserved -= reserved
            self._usage = _add(self._usage, prompt=prompt, completion=completion, estimated=int(estimated))
            self._changed.notify_all()

    def release(self, reserved: int) -> None:
        """Take back a call that was not made after all."""
        with self._changed:
            self._reserved -= reserved
            self._usage = _add(self._usage, calls=-1)
            self._changed.notify_all()

    def _passes(self, tokens: int) -> bool:
        return self.max_tokens is not None and self._usage.tokens + self._reserved + tokens > self.max_tokens


class Pace:
    """Lets no more than so many calls begin within any minute; None lets all. Safe to share between threads."""

    def __init__(self, per_minute: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._begun: deque[float] = deque()
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> bool:
        """Wait until the next call may begin; False if all was stopped before."""
        if self._per_minute is None:
            return True
        with self._lock:  # whoever came later waits behind
            while True:
                now = self._clock()
                while self._begun and now - self._begun[0] >= MINUTE:
                    self._begun.popleft()
                if len(self._begun) < self._per_minute:
                    self._begun.append(now)
                    return True
                if stopped.wait(self._begun[0] + MINUTE - now):
                    return False


def _add(usage: Usage, *, calls: int = 0, prompt: int = 0, completion: int = 0, estimated: int = 0) -> Usage:
    return Usage(
        calls=usage.calls + calls,
        prompt_tokens=usage.prompt_tokens + prompt,
        completion_tokens=usage.completion_tokens + completion,
        estimated_calls=usage.estimated_calls + estimated,
    )

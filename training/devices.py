"""Where a training runs and how its time is taken: the device, bfloat16 autocast, and a stopwatch for its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from feature_bank.errors import DataError


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name CUDA if there is one, else MPS, else the CPU.

    Raises DataError for a name that torch does not know or a device that is not there.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise DataError(f"trainer setting 'device': {name!r} cannot be used ({reason}); say cpu, or nothing") from e
    return device


def choose_autocast(wanted: bool | None, device: torch.device) -> bool:
    """Whether to compute products in bfloat16: as wanted, else on CUDA devices that do it in hardware."""
    if wanted is not None:
        return wanted
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def seed_generators(seed: int, device: torch.device) -> None:
    """Make what a step draws follow from `seed` alone, so that a resumed run draws the same and nothing is kept."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would take a hundred times as long
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Stopwatch:
    """Seconds of one run's steps, though several runs take turns. On CUDA the device's own clock is read."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        if self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - started

    def settle(self) -> float:
        """The seconds so far; waits for the device."""
        for begin, end in self._spans:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self._spans.clear()
        return self.seconds

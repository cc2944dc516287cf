"""Stopping a training between two steps instead of in one, and keeping a second process out of its folder."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from feature_bank.errors import DataError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOCK_FILE = ".lock"


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C and SIGTERM; yield a function that says whether one came, and deliver it after the block.

    A second one is not held back. Outside the main thread, and for signals that are ignored, nothing is changed.
    """
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def hold(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:
                before[number] = signal.signal(number, hold)
    try:
        yield lambda: bool(came)
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, which ends with the process however it ends.

    Raises DataError if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DataError(f"{folder}: another process is training here; wait for it or use another folder") from e
        yield

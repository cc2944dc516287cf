"""A command that works on the cluster from a process of its own, and is stopped in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.training.cluster.samples import PAUSE

ROOT = Path(__file__).parents[3]
PATIENCE = 60.0


def stop_driver(module: str, folder: Path, address: str, *, once: Callable[[], bool], end: signal.Signals) -> None:
    """Run `python -m module folder address`, send it the signal once that is true, and see that it ended by it."""
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        driver = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), address], cwd=ROOT, stdout=file, stderr=file
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not once():
                assert driver.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(PAUSE / 5)
            driver.send_signal(end)
            code = driver.wait(timeout=30)
        finally:
            driver.kill()
            driver.wait()
    assert code == (-signal.SIGKILL if end == signal.SIGKILL else 130), log.read_text()

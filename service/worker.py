"""A worker: one of the processes that a `Supervisor` starts, each with a model and an application of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

if TYPE_CHECKING:
    from service.settings import Settings

__all__ = ["command", "environment", "main", "plain_values", "start_line"]


def command() -> list[str]:
    """The command line of a worker. `-P` keeps the folder that the server was started in out of the modules' path."""
    return [sys.executable, "-P", "-m", "service.worker"]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, and that the worker imports the package that this one was imported from."""
    root = str(Path(__file__).resolve().parents[1])
    return {**base, "PYTHONPATH": os.pathsep.join(filter(None, [root, base.get("PYTHONPATH", "")]))}


def start_line(settings: Settings, engine: str) -> dict[str, Any]:
    """What a worker is told on standard input, keys included."""
    return {"settings": plain_values(settings), "engine": engine}


def plain_values(settings: Settings) -> dict[str, Any]:
    """Every setting, JSON-ready, keys included: for a process that is to serve under the same ones."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {
        name: value.get_secret_value()
        if isinstance(value, SecretStr)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in values.items()
    }


def main() -> None:
    """Serve on the socket that standard input names, until a signal or the end of standard input."""
    # What a reload would bring is read by a worker that starts anyway; the application puts its own handler here.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    start = json.loads(sys.stdin.buffer.readline())
    threading.Thread(
        target=_end_with_supervisor, args=(sys.stdin.fileno(), float(start["grace"])), name="lifeline", daemon=True
    ).start()

    from service.commands.serve import run_server
    from service.settings import Settings

    with socket.socket(fileno=start["listener"]) as listener:
        run_server(Settings(**start["settings"]), start["engine"], listener)


def _end_with_supervisor(lifeline: int, grace: float) -> None:
    """Drain when the supervisor is gone, and end for certain after `grace` seconds."""
    # Unbuffered: a thread inside a buffered reader makes the interpreter abort at its end.
    while os.read(lifeline, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(1)


if __name__ == "__main__":
    main()

"""The first of several processes: it holds the listening socket, starts the workers and starts a dead one again.

The workers accept connections on the inherited socket, so that it refuses none while one of them is being replaced,
and a worker that dies takes down its own requests alone. A worker finds on standard input one JSON line, which says
what to serve and on which file descriptor; the pipe stays open as long as the supervisor lives, and its end tells
the worker to drain. No model, no thread and no request is ever in this process.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

__all__ = ["GAVE_UP", "Supervisor"]

GAVE_UP = 3
"""Exit status after workers that died as soon as they were started."""

_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_MOST_EARLY_DEATHS = 5
_LONGEST_WAIT = 30.0


@dataclass(slots=True)
class _Worker:
    """One of the processes that serve, and the next one in its place."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    early_deaths: int = 0
    """Deaths in a row that came soon after the start."""
    due: float = 0.0
    """When it is to be started again, if it is dead."""


@dataclass(slots=True)
class _Asked:
    """What signals have asked for since the loop looked last."""

    stop: int = 0
    reload: bool = False
    names: list[str] = field(default_factory=list)


class Supervisor:
    """Runs `workers` processes of `command` on `listener` until a signal ends it.

    command: the worker's command line, or a function that returns it for the worker of a given number.
    start: what the first line on a worker's standard input says, beside `listener`, the socket's file descriptor, and
        `grace`. It may hold secrets, which a command line must not.
    environment: of the workers; `PROMETHEUS_MULTIPROC_DIR` is added.
    grace: seconds that the workers have to drain before they are killed.
    early: a worker that dies within so many seconds of its start has died early. After five early deaths in a row,
        with no worker that has lived longer, the supervisor gives up.
    backoff: seconds before the second start after early deaths; each further wait is twice as long, 30 s at most.
    """

    def __init__(
        self,
        command: Sequence[str] | Callable[[int], Sequence[str]],
        listener: socket.socket,
        workers: int,
        *,
        grace: float,
        environment: Mapping[str, str],
        start: Mapping[str, Any] | None = None,
        early: float = 10.0,
        backoff: float = 0.5,
        logger: Any = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least one process has to serve")
        self._command = command
        self._listener = listener
        self._grace = grace
        self._environment = dict(environment)
        self._start = json.dumps({**(start or {}), "listener": listener.fileno(), "grace": grace}).encode() + b"\n"
        self._early = early
        self._backoff = backoff
        self._logger = _json_logger() if logger is None else logger
        self._workers = [_Worker(number) for number in range(workers)]
        self._early_deaths = 0
        self.restarts = 0
        """Workers that were started in a dead one's place."""

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status.

        0: every worker has drained; 1: some had to be killed; `GAVE_UP`: they do not come up. SIGHUP is passed on to
        the workers. Belongs on the main thread.
        """
        folder = tempfile.mkdtemp(prefix="sailguard-metrics-")
        self._environment[_METRICS] = folder
        try:
            with _signals() as (asked, wakeup):
                try:
                    return self._serve(asked, wakeup, folder)
                finally:
                    self._kill()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _serve(self, asked: _Asked, wakeup: socket.socket, folder: str) -> int:
        with selectors.DefaultSelector() as selector:
            selector.register(wakeup, selectors.EVENT_READ)
            while not asked.stop:
                self._bury(folder)
                if self._hopeless():
                    self._logger.error(
                        "gave up",
                        deaths=self._early_deaths,
                        reason="the workers die as soon as they start; what they wrote above says why",
                    )
                    self._drain(asked, selector, wakeup)
                    return GAVE_UP
                self._start_due()
                if asked.reload:
                    asked.reload = False
                    self._signal(signal.SIGHUP)
                _sleep(selector, wakeup, self._until_next())
            return self._drain(asked, selector, wakeup)

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None and worker.due <= now:
                self._start_worker(worker)

    def _start_worker(self, worker: _Worker) -> None:
        command = self._command(worker.number) if callable(self._command) else self._command
        again = worker.began > 0
        # Held back rather than lost while the child inherits the mask: before the worker has a handler, the signal
        # would kill it. It lets the signal through once it has one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        worker.began = time.monotonic()
        self.restarts += again
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                env=self._environment,
                pass_fds=(self._listener.fileno(),),
                process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone, which then lets them drain
            )
        except OSError as error:  # no memory, no further process, or no such program
            self._logger.error("worker not started", worker=worker.number, error=str(error))
            self._note_death(worker)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        worker.process = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already, which the loop will see
            process.stdin.write(self._start)
            process.stdin.flush()
        self._logger.info("worker started", worker=worker.number, pid=process.pid, restarts=self.restarts)

    def _bury(self, folder: str) -> None:
        """Take the dead off the list and say when the next one in their place is due."""
        for worker in self._workers:
            process = worker.process
            if process is None or process.poll() is None:
                continue
            _forget(process, folder)
            worker.process = None
            lived, wait = self._note_death(worker)
            self._logger.error(
                "worker died",
                worker=worker.number,
                pid=process.pid,
                status=process.returncode,
                seconds=round(lived, 1),
                next_in=wait,
            )

    def _note_death(self, worker: _Worker) -> tuple[float, float]:
        """How many seconds it lived, and how many until the next one starts in its place."""
        now = time.monotonic()
        lived = now - worker.began
        if lived < self._early:
            worker.early_deaths += 1
            self._early_deaths += 1
        else:
            worker.early_deaths = self._early_deaths = 0
        wait = self._wait(worker.early_deaths)
        worker.due = now + wait
        return lived, wait

    def _wait(self, early_deaths: int) -> float:
        """Seconds before the next start: none after one death, for a worker may well be killed once."""
        if early_deaths < 2:
            return 0.0
        return float(min(self._backoff * 2.0 ** (early_deaths - 2), _LONGEST_WAIT))

    def _hopeless(self) -> bool:
        if self._early_deaths < _MOST_EARLY_DEATHS:
            return False
        now = time.monotonic()
        return not any(w.process is not None and now - w.began >= self._early for w in self._workers)

    def _until_next(self) -> float | None:
        """Seconds until a worker is due; None if all are up."""
        due = [worker.due for worker in self._workers if worker.process is None]
        return max(min(due) - time.monotonic(), 0.0) if due else None

    def _signal(self, number: signal.Signals) -> None:
        for process in self._alive():
            # Never sent to a process that was waited for, so that the pid is still its own.
            process.send_signal(number)

    def _alive(self) -> list[subprocess.Popen[bytes]]:
        processes = [worker.process for worker in self._workers if worker.process is not None]
        return [process for process in processes if process.poll() is None]

    def _drain(self, asked: _Asked, selector: selectors.BaseSelector, wakeup: socket.socket) -> int:
        """Ask the workers to end, and wait; a second request to stop cuts the waiting short."""
        self._logger.info("draining", workers=len(self._alive()), signals=asked.names)
        # Or connections would go on being accepted into its queue, where nobody takes them up.
        self._listener.close()
        self._signal(signal.SIGTERM)
        deadline, patience = time.monotonic() + self._grace, asked.stop + 1
        while self._alive() and asked.stop < patience:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            _sleep(selector, wakeup, left)
        late = self._alive()
        for process in late:
            self._logger.error("worker killed", pid=process.pid, reason="it did not end in time")
        self._kill()
        self._logger.info("stopped", killed=len(late))
        return 1 if late else 0

    def _kill(self) -> None:
        """End every process that is left and wait for it."""
        for worker in self._workers:
            process, worker.process = worker.process, None
            if process is not None:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                _close(process)


def _forget(process: subprocess.Popen[bytes], folder: str) -> None:
    from prometheus_client import multiprocess

    _close(process)
    # Its counters stay, for they only grow; what it showed of the moment goes.
    multiprocess.mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _sleep(selector: selectors.BaseSelector, wakeup: socket.socket, seconds: float | None) -> None:
    """Wait for a signal, a child's death included, or until `seconds` are over."""
    if selector.select(seconds):
        with contextlib.suppress(BlockingIOError):
            while wakeup.recv(4096):
                pass


@contextlib.contextmanager
def _signals() -> Iterator[tuple[_Asked, socket.socket]]:
    """Note signals instead of acting on them; the socket becomes readable with each."""
    asked = _Asked()

    def note(number: int, _: object) -> None:
        if number == signal.SIGHUP:
            asked.reload = True
        elif number != signal.SIGCHLD:
            asked.stop += 1
            asked.names.append(signal.Signals(number).name)

    reading, writing = socket.socketpair()
    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        # The wakeup first: a signal that is noted before the loop waits must not be slept through.
        fd = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield asked, reading
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)


def _json_logger() -> Any:
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )

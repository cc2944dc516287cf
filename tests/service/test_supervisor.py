"""The supervisor: the socket never refuses, a dead worker takes only its own requests along, nothing is orphaned."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import worker
from service.settings import Settings

PATIENCE = 30.0

SUPERVISE = """
import json, os, socket, sys
from service import worker
from service.supervisor import Supervisor

options = json.loads(sys.argv[1])
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
print(listener.getsockname()[1], flush=True)
sys.exit(Supervisor(
    [sys.executable, "-c", sys.argv[2]], listener, options["workers"], grace=options["grace"],
    environment=worker.environment(os.environ), start={"settings": {"port": 0}, "engine": "onnx"},
    early=options["early"], backoff=0.01,
).run())
"""

WORKER = """
import asyncio, os, signal
from pathlib import Path
import service.commands.serve as serve

def run_server(settings, engine, listener):
    import uvicorn
    reloads = []
    gates = Path(os.environ["GATES"])

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"pid %d\\n" % os.getpid(), "more_body": True})
        gate = scope["path"].strip("/")
        while gate and not (gates / gate).exists():
            await asyncio.sleep(0.01)
        body = f"{engine} {len(reloads)} {os.environ['PROMETHEUS_MULTIPROC_DIR']}"
        await send({"type": "http.response.body", "body": body.encode()})

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloads.append, 1)
            await super().startup(sockets)

    Server(uvicorn.Config(app, lifespan="off", log_level="critical")).run(sockets=[listener])

serve.run_server = run_server
from service.worker import main
main()
"""

STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
while True:
    time.sleep(1)
"""


class Running:
    """A supervisor in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def log(self) -> list[dict[str, Any]]:
        text = self._log.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log() if entry["event"] == name]

    def ask(self, gate: str = "") -> tuple[socket.socket, int]:
        """Send a request; returns the connection and the pid of the worker that has taken it up."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(f"GET /{gate} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        received = b""
        while (found := re.search(rb"pid (\d+)\n", received)) is None:
            piece = connection.recv(1)
            if not piece:
                connection.close()
                raise ConnectionError("the worker is gone")
            received += piece
        return connection, int(found[1])

    def spread(self, workers: int, gate: str = "") -> dict[int, socket.socket]:
        """One open request at each of so many workers."""
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < workers:
            assert time.monotonic() < deadline, "the requests did not spread over the workers"
            connection, pid = self.ask(gate)
            if pid in found:
                connection.close()
            else:
                found[pid] = connection
        return found


def rest(connection: socket.socket) -> str:
    """What else comes, until the connection ends."""
    with connection:
        pieces = []
        while piece := connection.recv(4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as stack:

        def start(script: str = WORKER, *, workers: int = 1, grace: float = PATIENCE, early: float = 0.0) -> Running:
            options = json.dumps({"workers": workers, "grace": grace, "early": early})
            log = tmp_path / "log"
            process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISE, options, script],
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(log.open("wb")),
                env=worker.environment({**os.environ, "GATES": str(tmp_path), "TMPDIR": str(tmp_path)}),
            )
            assert process.stdout is not None
            running = Running(process, int(process.stdout.readline()), log)

            def end() -> None:
                process.kill()
                process.wait()
                process.stdout.close()
                for entry in running.events("worker started"):
                    if lives(entry["pid"]):
                        os.kill(entry["pid"], signal.SIGKILL)

            stack.callback(end)
            return running

        yield start


def metric_folders(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("sailguard-metrics-*"))


def test_a_killed_worker_is_replaced_and_only_its_own_request_fails(
    supervise: Callable[..., Running], tmp_path: Path
) -> None:
    running = supervise(workers=2)
    (victim, lost), (other, kept) = running.spread(2, "gate").items()
    os.kill(victim, signal.SIGKILL)
    # A connection reset is as good an end as a closed one.
    with contextlib.suppress(ConnectionError):
        assert "onnx" not in rest(lost)
    for _ in range(20):  # the socket listens all the time
        running.ask()[0].close()
    wait_until(lambda: len(running.events("worker started")) == 3)
    fresh = running.events("worker started")[-1]
    assert fresh["restarts"] == 1
    assert lives(other)
    (tmp_path / "gate").touch()
    assert "onnx 0" in rest(kept)
    again = running.spread(2)
    assert set(again) == {other, fresh["pid"]}
    for connection in again.values():
        connection.close()
    (died,) = running.events("worker died")
    assert (died["pid"], died["status"]) == (victim, -signal.SIGKILL)


def test_a_connection_made_while_no_worker_lives_is_served_by_the_next(supervise: Callable[..., Running]) -> None:
    running = supervise()
    connection, pid = running.ask()
    connection.close()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not lives(pid))
    connection, again = running.ask()
    assert "onnx" in rest(connection)
    assert again != pid


def test_stopping_lets_a_request_end_and_accepts_no_further_one(
    supervise: Callable[..., Running], tmp_path: Path
) -> None:
    running = supervise(workers=2)
    connection, _ = running.ask("gate")
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bool(running.events("draining")))

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE).close()
        except ConnectionError:
            return True
        return False

    wait_until(refused)
    (tmp_path / "gate").touch()
    assert "onnx 0" in rest(connection)
    assert running.process.wait(PATIENCE) == 0
    assert running.events("stopped")[0]["killed"] == 0
    assert metric_folders(tmp_path) == []
    assert [entry["pid"] for entry in running.events("worker started") if lives(entry["pid"])] == []


def test_workers_that_do_not_drain_in_time_are_killed(supervise: Callable[..., Running], tmp_path: Path) -> None:
    running = supervise(STUBBORN, grace=0.2)
    wait_until(lambda: bool(running.events("worker started")))
    (started,) = running.events("worker started")
    # Python ignores the signal only once the script has come that far.
    wait_until(lambda: int(ignored(started["pid"]), 16) >> (signal.SIGTERM - 1) & 1 == 1)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(PATIENCE) == 1
    assert not lives(started["pid"])
    assert metric_folders(tmp_path) == []


def ignored(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0]


def test_a_second_request_to_stop_ends_the_waiting(supervise: Callable[..., Running]) -> None:
    running = supervise()
    connection, pid = running.ask("never")
    running.process.send_signal(signal.SIGTERM)
    wait_until(lambda: bool(running.events("draining")))
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE) == 1
    assert not lives(pid)
    connection.close()


def test_workers_end_when_their_supervisor_is_killed(supervise: Callable[..., Running], tmp_path: Path) -> None:
    running = supervise(workers=2)
    workers = running.spread(2, "gate")
    running.process.kill()
    running.process.wait()
    (tmp_path / "gate").touch()
    for connection in workers.values():
        assert "onnx 0" in rest(connection)  # they drain
    wait_until(lambda: not any(lives(pid) for pid in workers))


def test_a_hanging_worker_ends_too_when_its_supervisor_is_killed(supervise: Callable[..., Running]) -> None:
    running = supervise(grace=0.2)
    connection, pid = running.ask("never")
    running.process.kill()
    wait_until(lambda: not lives(pid))
    connection.close()


def test_workers_that_die_at_once_are_given_up(supervise: Callable[..., Running], tmp_path: Path) -> None:
    running = supervise("raise SystemExit(7)", workers=2, early=PATIENCE)
    assert running.process.wait(PATIENCE) == 3
    assert {entry["status"] for entry in running.events("worker died")} == {7}
    (message,) = running.events("gave up")
    assert message["deaths"] >= 5
    assert metric_folders(tmp_path) == []


def test_a_program_that_cannot_be_started_is_given_up(tmp_path: Path) -> None:
    script = SUPERVISE.replace('[sys.executable, "-c", sys.argv[2]]', "lambda number: [sys.argv[2], str(number)]")
    options = json.dumps({"workers": 1, "grace": 1.0, "early": PATIENCE})
    done = subprocess.run(
        [sys.executable, "-c", script, options, str(tmp_path / "missing")],
        env=worker.environment(os.environ),
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 3
    assert b"worker not started" in done.stderr


def test_a_worker_that_has_lived_long_enough_is_always_started_again(supervise: Callable[..., Running]) -> None:
    running = supervise("raise SystemExit(7)", early=0.0)
    wait_until(lambda: len(running.events("worker died")) > 8)
    assert running.process.poll() is None
    running.process.terminate()
    assert running.process.wait(PATIENCE) == 0


def test_hangup_is_passed_on_to_every_worker(supervise: Callable[..., Running], tmp_path: Path) -> None:
    running = supervise(workers=2)
    workers = running.spread(2, "gate")
    running.process.send_signal(signal.SIGHUP)

    def reloaded() -> bool:
        found = {}
        for _ in range(8):
            connection, pid = running.ask()
            found[pid] = rest(connection)
        return set(found) == set(workers) and all("onnx 1" in text for text in found.values())

    wait_until(reloaded)
    assert all(lives(pid) for pid in workers)
    for connection in workers.values():
        connection.close()


def test_workers_share_a_fresh_folder_for_their_metrics(supervise: Callable[..., Running], tmp_path: Path) -> None:
    running = supervise(workers=2)
    workers = running.spread(2, "gate")
    (folder,) = metric_folders(tmp_path)
    assert folder.stat().st_mode & 0o077 == 0
    # What a dead worker showed of the moment goes, what it counted stays.
    victim = next(iter(workers))
    (folder / f"gauge_liveall_{victim}.db").touch()
    (folder / f"counter_{victim}.db").touch()
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not (folder / f"gauge_liveall_{victim}.db").exists())
    assert (folder / f"counter_{victim}.db").exists()
    (tmp_path / "gate").touch()
    texts = []
    for pid, connection in workers.items():
        if pid != victim:
            texts.append(rest(connection))
        connection.close()
    assert all(str(folder) in text for text in texts)


def test_settings_and_their_keys_reach_a_worker_whole(tmp_path: Path) -> None:
    settings = Settings(api_keys="one,two", upstream_key="three", bank=tmp_path, workers=2, hold_back=4)
    line = json.loads(json.dumps(worker.start_line(settings, "onnx")))
    assert Settings(**line["settings"]) == settings
    assert line["engine"] == "onnx"
    assert not any(key in part for part in worker.command() for key in ("one", "two", "three"))

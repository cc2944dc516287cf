"""A real Prometheus for tests: it scrapes every second, on loopback, into a folder that goes away."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.metrics import CONTENT_TYPE, Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PATIENCE = 60.0
Series = Mapping[str, Any]
"""One series of an answer: its labels under `metric`, its last sample under `value`."""


def tool(name: str) -> str:
    """The path of a Prometheus tool; the test is skipped where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian's package is called prometheus")
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Exporter:
    """Shows a `Metrics` at `/metrics`, as the service does."""

    def __init__(self, metrics: Metrics) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = metrics.render()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> str:
        self._thread.start()
        return f"127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE)


class Prometheus:
    """A running server, asked over its HTTP API."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self._address = address
        self._process = process
        self._log = log

    def get(self, path: str, **parameters: str) -> Any:
        """What the API answers, as it stands under `data`."""
        assert self._process.poll() is None, f"prometheus ended: {self._log.read_text()}"
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{parameters}: {error.read().decode()}")

    def query(self, expression: str) -> list[Series]:
        """The series of an expression that have a number now."""
        found = self.get("query", query=expression)["result"]
        return [series for series in found if math.isfinite(float(series["value"][1]))]

    def wait_for(self, wanted: Mapping[str, str], step: Callable[[], None]) -> dict[str, list[Series]]:
        """Ask each of `wanted`, names with their expressions, until all have data; `step` comes before each round."""
        found: dict[str, list[Series]] = {}
        deadline = time.monotonic() + PATIENCE
        while missing := wanted.keys() - found.keys():
            assert time.monotonic() < deadline, f"no data for {[(name, wanted[name]) for name in sorted(missing)]}"
            step()
            for name in missing:
                if series := self.query(wanted[name]):
                    found[name] = series
            time.sleep(0.2)
        return found


@contextlib.contextmanager
def running(folder: Path, targets: Sequence[str], *, history: str = "") -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration, scraping `targets`; `history` is in OpenMetrics' text format."""
    data = folder / "data"
    data.mkdir(parents=True)
    if history:
        (folder / "history.txt").write_text(history)
        command = [tool("promtool"), "tsdb", "create-blocks-from", "openmetrics", "--quiet"]
        subprocess.run([*command, str(folder / "history.txt"), str(data)], check=True, capture_output=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(_configuration(targets)))
    log = folder / "log"
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={data}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process, log)
        yield Prometheus(f"127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _configuration(targets: Sequence[str]) -> dict[str, Any]:
    """The shipped configuration, scraping the given targets every second."""
    configuration: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(DEPLOY / name) for name in configuration["rule_files"]]
    (job,) = configuration["scrape_configs"]
    job.pop("scrape_timeout", None)
    job["static_configs"] = [{"targets": list(targets)}]
    return configuration


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, f"prometheus did not start: {log.read_text()}"
        assert time.monotonic() < deadline, "prometheus took too long to start"
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.05)


def history_of(lines: Iterable[tuple[str, float, float]]) -> str:
    """OpenMetrics text of samples: series, value and time in seconds; one series' samples stand together."""
    return "".join(f"{series} {value} {moment:.3f}\n" for series, value, moment in lines) + "# EOF\n"

"""`sailguard serve --cluster`, from its first line to its end, as a proxy whose answer is still being streamed then."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.deploy.prometheus import DEPLOY
from tests.service.cluster.conftest import PATIENCE
from tests.service.upstream_server import Received, Speaker, UpstreamServer

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")]

CHAT = {"messages": [{"role": "user", "content": "Of lakes"}], "stream": True}


def test_the_command_serves_a_proxy_and_ends_after_the_answers_that_are_under_way(exported: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")

    async def script(_: Received, say: Speaker) -> None:
        await say.head()
        await say.chat("of ", "lakes ", finish=None, done=False)
        await say.until("the end")
        await say.chat("and ", "hills")

    options = ["--cluster", "local", "--model", str(exported), "--port", "0", "--replicas", "1", "--policy", "monitor"]
    environment = {**os.environ, "PYTHONPATH": str(DEPLOY.parent), "SAILGUARD_HOLD_BACK": "1"}
    environment.pop("RAY_ADDRESS", None)
    with UpstreamServer() as upstream:
        upstream.script = script
        command = [sys.executable, "-m", "service.cli", "serve", *options, "--upstream", upstream.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stderr is not None
            lines: list[str] = []
            url = ""
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"sailguard serves (http://127\.0\.0\.1:\d+) on every machine", line):
                    url = found[1]
                    break
            assert url, "".join(lines)
            rest = threading.Thread(target=process.stderr.read)  # so that it never waits for a reader
            rest.start()
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT, timeout=PATIENCE) as answer:
                assert answer.status_code == 200
                assert answer.headers["content-type"].startswith("text/event-stream")
                parts = answer.iter_text()
                said = next(parts)  # it has begun before the upstream has ended
                process.send_signal(signal.SIGTERM)
                upstream.open("the end")
                said += "".join(parts)
            assert "hills" in said
            assert said.rstrip().endswith("data: [DONE]")
            assert process.wait(PATIENCE) == 0
            rest.join(PATIENCE)
            process.stderr.close()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/healthz")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(PATIENCE)
                finally:
                    process.kill()

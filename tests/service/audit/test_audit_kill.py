"""A verdict whose response was received survives the server's death by SIGKILL."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.service.audits import is_whole, stored

ROOT = Path(__file__).resolve().parents[3]
_SERVER = """
import pathlib, socket, sys
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from service.audit import Audit
from tests.service.audits import Counts, entry

audit = Audit.open(pathlib.Path(sys.argv[1]), text=False, days=1, metrics=Counts())

async def judge(request):
    name = request.path_params["name"]
    if not await audit.record([entry(name), entry(name, choice=1)], "block"):
        return JSONResponse({}, status_code=503)
    return JSONResponse({"request": name})

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
app = Starlette(routes=[Route("/{name}", judge)])
uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run([listener])
"""


def test_every_verdict_whose_response_was_received_is_in_the_file_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    received: list[str] = []
    for life in range(4):
        command = [sys.executable, "-c", _SERVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
            try:
                assert server.stdout is not None
                connection = http.client.HTTPConnection("127.0.0.1", int(server.stdout.readline()), timeout=20)
                for number in range(life + 1):
                    connection.request("GET", f"/req_{life}_{number}")
                    response = connection.getresponse()
                    assert response.status == 200
                    received.append(json.loads(response.read())["request"])
            finally:
                server.kill()
            connection.close()
        assert server.returncode == -signal.SIGKILL
        found = [(row["request_id"], row["choice"]) for row in stored(path)]
        assert found == [(name, choice) for name in received for choice in (0, 1)]
        assert is_whole(path)

"""What the service costs and stands: the sidecar's latency, throughput, memory and load, and the chat server's share.

    python -m benchmarks.service [--data FOLDER] [--rounds 40] [--load 120] [--parts latency,load,auroc,chat]

Everything is asked over HTTP on loopback, but for the passes of torch that the sidecar is compared with: these are
timed in this process, in turn with the requests. Whoever is not being timed stands still.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, Figure, read_result, write_result
from benchmarks.service_load import text

TOKENS = 100
DATA = "SAILGUARD_DATA"


class Server:
    """`sailguard serve` in a process of its own."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-P", "-m", "service.cli", "serve", "--port", str(port), *arguments]
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SAILGUARD_") or k == "SAILGUARD_CACHE"}
        root = str(Path(__file__).parents[1])
        environ |= {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", **environment}
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        began = time.perf_counter()
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
        while not self._ready():
            if self.process.poll() is not None or time.perf_counter() - began > 180:
                raise SystemExit(f"benchmarks.service: the server does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        self.start_seconds = time.perf_counter() - began

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/readyz", timeout=5).status == 200
        return False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to one request."""
        data = json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.loads(answer.read())

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        page = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))

    @property
    def processes(self) -> list[int]:
        """The server's process, and those that it has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def resident_mb(self) -> float:
        """Memory of the largest of its processes."""
        return max(resident_mb(pid) for pid in self.processes)

    def halt(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.terminate()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def resident_mb(pid: int) -> float:
    """Memory that a process holds, in MB of 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024 / 1e6


@contextlib.contextmanager
def served(arguments: Sequence[str], log: Path, **environment: str) -> Iterator[Server]:
    server = Server(arguments, log, **environment)
    try:
        yield server
    finally:
        server.close()


def exported(folder: Path) -> dict[str, Path]:
    """The sidecar in both precisions, each in a folder of its own; one that is there already is taken as it is."""
    found = {precision: folder / precision for precision in ("int8", "fp32")}
    for precision, place in found.items():
        if place.exists():
            continue
        command = [sys.executable, "-P", "-m", "service.cli", "export-onnx", "shipped", str(place), f"--{precision}"]
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL)
    return found


def timed(function: Callable[[], Any]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - began)


def latency(folders: dict[str, Path], rounds: int, logs: Path) -> tuple[dict[str, Figure], dict[str, Any]]:
    """One client and a text of 100 tokens: the sidecar over HTTP against passes of torch in this process, in turn."""
    import torch

    from feature_bank.layout import render
    from guard.capture import truncated_forward
    from guard.core import Guard
    from guard.models import load_model

    loaded = load_model(device="cpu", dtype="float32")
    guard = Guard.from_bank()
    words = text(2 * TOKENS, 0)
    ids = loaded.tokenizer(words)["input_ids"][:TOKENS]
    body = {"input": loaded.tokenizer.decode(ids)}
    batch = torch.tensor([ids])
    read = torch.tensor([render(loaded.tokenizer, body["input"], "prompt", max_tokens=4 * TOKENS).ids])

    def whole(batch: torch.Tensor) -> None:
        with torch.inference_mode():
            loaded.model(input_ids=batch, use_cache=False)

    def truncated() -> None:
        truncated_forward(loaded.model, guard.bank.hook_names, batch)

    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(served(_sidecar(f), logs / name)) for name, f in folders.items()}
        starts = {name: server.start_seconds for name, server in servers.items()}
        arms: dict[str, Callable[[], Any]] = {
            "torch fp32, whole model": lambda: whole(batch),
            "torch fp32, whole model, as a prompt": lambda: whole(read),
            "torch fp32, to the last hook": truncated,
        }
        for name, server in servers.items():
            arms[f"sidecar {name}"] = lambda server=server: server.post("/v1/moderations", body)
            arms[f"sidecar {name}, passage"] = lambda server=server: server.post(
                "/v1/moderations", {**body, "role": "passage"}
            )
            judged = server.post("/v1/moderations", body)["results"][0]["tokens"]
            server.halt()
        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(rounds):
            order = list(arms)
            for name in (*order[number % len(order) :], *order[: number % len(order)]):
                server = servers.get(name.removeprefix("sidecar ").removesuffix(", passage"))
                if server is not None:
                    server.go_on()
                arms[name]()  # caches are warm, as under load
                times[name].append(timed(arms[name]))
                if server is not None:
                    server.halt()
        memory = {name: server.resident_mb() for name, server in servers.items()}
    p50 = {name: median(values) for name, values in times.items()}
    print({name: round(value, 1) for name, value in p50.items()}, starts, flush=True)
    figures = {
        "sidecar_p50_ms_100_tokens": Figure(value=p50["sidecar int8"], unit="ms", n=rounds),
        "sidecar_vs_full_forward": Figure(
            value=p50["torch fp32, whole model, as a prompt"] / p50["sidecar int8"], unit="ratio", n=rounds
        ),
        "sidecar_vs_full_forward_bare": Figure(
            value=p50["torch fp32, whole model"] / p50["sidecar int8"], unit="ratio", n=rounds
        ),
        "sidecar_passage_vs_full_forward": Figure(
            value=p50["torch fp32, whole model"] / p50["sidecar int8, passage"], unit="ratio", n=rounds
        ),
        "sidecar_passage_p50_ms_100_tokens": Figure(value=p50["sidecar int8, passage"], unit="ms", n=rounds),
        "sidecar_start_seconds": Figure(value=starts["int8"], unit="s"),
    }
    quartiles = {name: [float(q) for q in np.percentile(values, (25, 50, 75, 99))] for name, values in times.items()}
    return figures, {"tokens": judged, "ms_p25_p50_p75_p99": quartiles, "start_seconds": starts, "idle_rss_mb": memory}


def _sidecar(folder: Path) -> list[str]:
    return ["--engine", "onnx", "--model", str(folder)]


def ask(server: Server, **options: object) -> dict[str, Any]:
    """What the clients of `service_load` report."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.service_load", server.url, *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def load(folders: dict[str, Path], seconds: float, logs: Path) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Texts a second of both precisions in turn, then minutes of mixed texts, then a worker that is killed."""
    rates: dict[str, list[float]] = {name: [] for name in folders}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(served(_sidecar(f), logs / name)) for name, f in folders.items()}
        for server in servers.values():
            server.halt()
        for _ in range(3):
            for name, server in servers.items():
                server.go_on()
                found = ask(server, clients=64, seconds=10, tokens=TOKENS)
                rates[name].append(len(found["times"]) / found["seconds"])
                server.halt()
    print({name: [round(rate, 1) for rate in each] for name, each in rates.items()}, flush=True)
    with served(_sidecar(folders["int8"]), logs / "load") as server:
        memory: list[float] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                memory.append(server.resident_mb())

        ask(server, clients=64, seconds=15, tokens="20,100,400")  # every length has been seen once
        watcher = threading.Thread(target=watch)
        watcher.start()
        found = ask(server, clients=64, seconds=seconds, tokens="20,100,400")
        over.set()
        watcher.join()
    times = found["times"]
    errors = sum(count for status, count in found["statuses"].items() if status not in ("200", "429", "503"))
    tenth = max(1, len(memory) // 10)
    growth = median(memory[-tenth:]) / median(memory[:tenth]) - 1
    killed = _kill_a_worker(folders["int8"], logs / "killed")
    figures = {
        "texts_per_second_int8": Figure(value=median(rates["int8"]), unit="1/s", n=3),
        "texts_per_second_int8_vs_fp32": Figure(value=median(rates["int8"]) / median(rates["fp32"]), unit="ratio", n=3),
        "load_errors": Figure(value=errors, unit="requests", n=sum(found["statuses"].values())),
        "load_p99_ms": Figure(value=1000 * float(np.percentile(times, 99)), unit="ms", n=len(times)),
        "load_rss_growth": Figure(value=growth, unit="share", n=len(memory)),
        "rss_mb_int8": Figure(value=max(memory), unit="MB", n=len(memory)),
    }
    detail = {
        "clients": 64,
        "seconds": seconds,
        "texts_per_second": rates,
        "statuses": found["statuses"],
        "ms": {f"p{q}": 1000 * float(np.percentile(times, q)) for q in (50, 90, 99)},
        "rss_mb": {"first": median(memory[:tenth]), "last": median(memory[-tenth:]), "most": max(memory)},
        "killed_worker": killed,
    }
    print(detail, flush=True)
    return figures, detail


def _kill_a_worker(folder: Path, log: Path) -> dict[str, Any]:
    """Two workers under load, one of which is killed: what the clients saw, and how many of its requests were open."""
    with served([*_sidecar(folder), "--workers", "2"], log) as server:
        time.sleep(3)  # the second worker is there as well
        before = server.processes[1:]
        result: list[dict[str, Any]] = []
        clients = threading.Thread(target=lambda: result.append(ask(server, clients=64, seconds=20, tokens="20,100")))
        clients.start()
        time.sleep(8)
        os.kill(before[0], signal.SIGKILL)
        clients.join()
        after = server.processes[1:]
        restarted = len(after) == 2 and before[0] not in after and before[1] in after
    return {"statuses": result[0]["statuses"], "restarted": restarted}


def auroc(folders: dict[str, Path], data: Path, sample: int | None) -> tuple[dict[str, Figure], dict[str, Any]]:
    """How far int8's AUROC on the development rows lies below fp32's, and how far the scores lie from torch's."""
    from sklearn.metrics import roc_auc_score

    from guard.core import Guard
    from guard.engines.onnx import OnnxEngine
    from guard.models import load_model
    from training.corpus import read_documents

    documents, _ = read_documents([data / "dev.jsonl.gz"])
    rows = [document for document in documents if document.known]
    if sample is not None:
        rows = sorted(rows, key=lambda document: hashlib.sha256(document.id.encode()).digest())[:sample]
    texts, roles = [d.text for d in rows], [d.role for d in rows]
    scores: dict[str, list[dict[str, float]]] = {}
    for name, folder in folders.items():
        engine = OnnxEngine.start(folder)
        scores[name] = [dict(score.scores) for score in engine.score(texts, roles)]
        engine.close()
    found: dict[str, dict[str, float]] = {}
    for domain in scores["int8"][0]:
        known = [i for i, document in enumerate(rows) if domain in document.known]
        labels = [domain in rows[i].domains for i in known]
        found[domain] = {
            name: float(roc_auc_score(labels, [each[i][domain] for i in known])) for name, each in scores.items()
        }
    loaded = load_model(device="cpu", dtype="float32")
    part = [i for i, text in enumerate(texts) if len(text) < 2000][:200]
    with Guard.from_bank().attach(loaded.model, loaded.tokenizer) as attached:
        reference = attached.score([texts[i] for i in part], [roles[i] for i in part])
    parity = max(
        abs(scores["fp32"][i][domain] - value)
        for i, score in zip(part, reference, strict=True)
        for domain, value in score.scores.items()
    )
    drop = max(each["fp32"] - each["int8"] for each in found.values())
    print(found, parity, flush=True)
    figures = {
        "int8_auroc_drop_max": Figure(value=drop, unit="AUROC", n=len(rows)),
        "fp32_vs_torch_max": Figure(value=parity, unit="probability", n=len(part)),
    }
    return figures, {"rows": len(rows), "auroc": found}


def chat(rounds: int, logs: Path) -> tuple[dict[str, Figure], dict[str, Any]]:
    """The guard's share of the time that the chat server's model needs for a token, by its own clock."""
    tokens = 128
    body = {
        "model": "sailguard",
        "messages": [{"role": "user", "content": "Describe the harbour of an old town."}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    shares: dict[str, list[float]] = {}
    per_token: dict[str, list[float]] = {}
    with served(["--policy", "monitor"], logs / "chat", SAILGUARD_MAX_CONCURRENT="8") as server:
        server.post("/v1/chat/completions", body)
        for clients in (1, 8):
            for _ in range(rounds):
                before = server.metric("sailguard_step_overhead_seconds_sum")
                generated = server.metric("sailguard_tokens_generated_total")
                began = time.perf_counter()
                threads = [
                    threading.Thread(target=server.post, args=("/v1/chat/completions", body)) for _ in range(clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = time.perf_counter() - began
                spent = server.metric("sailguard_step_overhead_seconds_sum") - before
                made = server.metric("sailguard_tokens_generated_total") - generated
                shares.setdefault(f"c{clients}", []).append(spent / seconds)
                per_token.setdefault(f"c{clients}", []).append(1000 * seconds / made)
    print({name: [round(s, 4) for s in each] for name, each in shares.items()}, flush=True)
    figures = {
        f"chat_guard_share_{name}": Figure(value=median(each), unit="share", n=rounds) for name, each in shares.items()
    }
    return figures, {"tokens": tokens, "share": shares, "ms_per_token": per_token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get(DATA), help=f"folder of dev.jsonl.gz, or {DATA}")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--load", type=float, default=120.0, help="seconds of the load")
    parser.add_argument("--sample", type=int, help="rows of dev, chosen by hash; all if left out")
    parser.add_argument("--exports", type=Path, help="keep the exported sidecars here for the next run")
    parser.add_argument("--parts", default="latency,load,auroc,chat", help="a part that is left out keeps its figures")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if "auroc" in parts and (args.data is None or not (Path(args.data) / "dev.jsonl.gz").exists()):
        raise SystemExit(
            f"benchmarks.service: --data, or {DATA}, names no folder with dev.jsonl.gz; or leave auroc out"
        )
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {}
    if (RESULTS / "service.json").exists():
        earlier = read_result(RESULTS / "service.json")
        figures, detail = dict(earlier.figures), dict(earlier.detail)
    with tempfile.TemporaryDirectory() as place:
        logs = Path(place)
        folders = exported(args.exports or logs / "exports") if set(parts) - {"chat"} else {}
        run: dict[str, Callable[[], tuple[dict[str, Figure], dict[str, Any]]]] = {
            "latency": lambda: latency(folders, args.rounds, logs),
            "load": lambda: load(folders, args.load, logs),
            "auroc": lambda: auroc(folders, Path(args.data), args.sample),
            "chat": lambda: chat(3, logs),
        }
        for part in parts:
            found, told = run[part]()
            figures |= found
            detail[part] = told
            write_result("service", figures, detail, packages=("onnxruntime", "tokenizers", "fastapi", "uvicorn"))


if __name__ == "__main__":
    main()

"""What Ray Serve costs the sidecar: two replicas behind its proxy against two workers of `serve`, on the same cores.

    python -m benchmarks.service_cluster [--rounds 3] [--exports FOLDER]

Both judge with int8 weights, a thread each. They take turns, each started anew for every round, since a cluster that
stands by is not idle. A page that costs next to nothing shows what passes the proxy when no judging is in the way; the
clients have the same cores, so that it is a lower bound.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.overhead import interleaved
from benchmarks.results import RESULTS, Figure, write_result
from benchmarks.service import TOKENS, ask, exported, served

PAGE = "/healthz"
CLIENTS = 64
REPLICAS = 2
SECONDS = 15.0


class ClusterBench:
    """Servers that are asked for judgements, and for a page; each gives judgements a second and remembers the rest."""

    def __init__(self, sidecar: Path, logs: Path) -> None:
        self.logs = logs
        onnx = ["--engine", "onnx", "--model", str(sidecar)]
        self.arguments = {
            "serve": [*onnx, "--workers", str(REPLICAS)],
            "ray_serve": [*onnx, "--cluster", "local", "--replicas", str(REPLICAS)],
        }
        self.pages: dict[str, list[float]] = {name: [] for name in self.arguments}
        self.page_ms: dict[str, list[float]] = {name: [] for name in self.arguments}
        self.start_seconds: dict[str, list[float]] = {name: [] for name in self.arguments}

    def rate(self, name: str) -> float:
        """Texts of 100 tokens a second."""
        with served(self.arguments[name], self.logs / name, SAILGUARD_THREADS="1") as server:
            self.start_seconds[name].append(server.start_seconds)
            ask(server, clients=CLIENTS, seconds=5, tokens=TOKENS)  # every process has judged
            judged = _checked(ask(server, clients=CLIENTS, seconds=SECONDS, tokens=TOKENS))
            pages = _checked(ask(server, clients=CLIENTS, seconds=SECONDS / 3, path=PAGE))
            alone = _checked(ask(server, clients=1, seconds=SECONDS / 3, path=PAGE))
        self.pages[name].append(len(pages["times"]) / pages["seconds"])
        self.page_ms[name].append(1000 * statistics.median(alone["times"]))
        rate = len(judged["times"]) / judged["seconds"]
        print(
            f"{name}: {rate:.1f} texts/s, {self.pages[name][-1]:,.0f} pages/s, {self.page_ms[name][-1]:.1f} ms a page"
        )
        return rate


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    if found["statuses"].keys() != {"200"}:
        raise SystemExit(f"benchmarks.service_cluster: not every request was answered: {found['statuses']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exports", type=Path, help="keep the exported sidecars here for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = exported(options.exports or Path(place) / "exports")
        bench = ClusterBench(folders["int8"], Path(place))
        rates = interleaved({name: partial(bench.rate, name) for name in bench.arguments}, options.rounds)
    quotients = [a / b for a, b in zip(rates["ray_serve"], rates["serve"], strict=True)]
    figures = {
        "texts_per_second": Figure(value=statistics.median(rates["ray_serve"]), unit="1/s", n=options.rounds),
        "texts_per_second_vs_serve": Figure(value=statistics.median(quotients), unit="ratio", n=len(quotients)),
        "pages_per_second": Figure(value=statistics.median(bench.pages["ray_serve"]), unit="1/s", n=options.rounds),
        "page_ms": Figure(value=statistics.median(bench.page_ms["ray_serve"]), unit="ms", n=options.rounds),
        "page_ms_serve": Figure(value=statistics.median(bench.page_ms["serve"]), unit="ms", n=options.rounds),
    }
    detail = {
        "clients": CLIENTS,
        "replicas": REPLICAS,
        "tokens": TOKENS,
        "page": PAGE,
        "texts_per_second": rates,
        "pages_per_second": bench.pages,
        "page_ms": bench.page_ms,
        "start_seconds": bench.start_seconds,
    }
    print(write_result("service_cluster", figures, detail, packages=["ray", "onnxruntime"], folder=options.out))


if __name__ == "__main__":
    main()

"""What Ray costs a harvest, and what a second worker gains: tokens a second in one process, and on 1 and 2 workers.

    python -m benchmarks.scale [--data FOLDER] [--tokens 120000] [--rounds 3]

All arms compute with one thread, on a cluster of this machine, over the same sequences; they take turns, and a ratio is
of one round. What a worker needs to start is a cost of its own, once a harvest, and stands in the detail: a rate is
counted from the moment when every worker has made its first shard.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harvesting import read_text, sequences_of
from benchmarks.overhead import interleaved
from benchmarks.results import RESULTS, Figure, write_result
from guard.models import load_model
from training.cluster import connect
from training.cluster.harvesting import make_on_cluster
from training.corpus import TokenSequence
from training.harvest import harvest, make_here

HOOK_NAME = "blocks.14.hook_resid_post"
SHARD_TOKENS = 2048
WORKERS = (1, 2)


class ScaleBench:
    """Harvests of the same sequences; each gives its rate, and remembers how long it took to start."""

    def __init__(self, model: Any, sequences: Sequence[TokenSequence], scratch: Path) -> None:
        self.model = model
        self.sequences = sequences
        self.scratch = scratch
        self.start_seconds: dict[str, list[float]] = {}

    def arms(self) -> dict[str, Callable[[], float]]:
        found = {"here": partial(self.rate, "here", make_here, 1)}
        for workers in WORKERS:
            name = f"ray_{workers}"
            found[name] = partial(self.rate, name, partial(make_on_cluster, max_workers=workers), workers)
        return found

    def rate(self, name: str, make: Callable[..., Any], workers: int) -> float:
        """Tokens a second after the first `workers` shards."""
        seen: list[tuple[float, int]] = []
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            harvest(
                self.model,
                self.sequences,
                (HOOK_NAME,),
                Path(folder) / "cache",
                fingerprint={"model": "embedded"},
                shard_tokens=SHARD_TOKENS,
                make=make,
                on_shard=lambda *progress: seen.append((time.perf_counter(), progress[2])),
            )
        (first, before), (last, tokens) = seen[workers - 1], seen[-1]
        self.start_seconds.setdefault(name, []).append(first - began)
        print(f"{name}: {(tokens - before) / (last - first):,.0f} tokens/s, the first after {first - began:.1f} s")
        return (tokens - before) / (last - first)


def figures_of(rates: dict[str, list[float]]) -> dict[str, Figure]:
    """Medians over the rounds of one arm's rate over another's."""

    def median(above: str, below: str) -> Figure:
        quotients = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        return Figure(value=round(statistics.median(quotients), 4), unit="ratio", n=len(quotients))

    return {"ray_overhead": median("here", "ray_1"), "harvest_2_workers_vs_1": median("ray_2", "ray_1")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a folder of JSON lines, besides the project's text")
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_model(device="cpu")
    sequences, _ = sequences_of(read_text(options.data), loaded.tokenizer, options.tokens)
    with tempfile.TemporaryDirectory() as scratch, connect("local"):
        bench = ScaleBench(loaded.model, sequences, Path(scratch))
        rates = interleaved(bench.arms(), options.rounds)
    detail = {
        "tokens": sum(len(s.ids) for s in sequences),
        "hook_name": HOOK_NAME,
        "shard_tokens": SHARD_TOKENS,
        "threads_of_a_worker": 1,
        "tokens_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "start_seconds": {name: [round(s, 2) for s in found] for name, found in bench.start_seconds.items()},
    }
    print(write_result("scale", figures_of(rates), detail, packages=["ray"], folder=options.out))


if __name__ == "__main__":
    main()

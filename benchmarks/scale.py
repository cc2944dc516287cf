"""What Ray costs a harvest, what a second worker gains, and how costs grow with the corpus.

    python -m benchmarks.scale [--data FOLDER] [--tokens 98000] [--shard-tokens 16384] [--rounds 3]
                              [--curve-tokens 320000]

Tokens a second are of one process on one core and on two, and of workers with a core each: two on two cores; one, with
Ray's own processes and the command free to use the other core; and one with all of those on its own core. They harvest
the same sequences and take turns, and a ratio is of one round. What a worker needs to start is a cost of its own, once
a harvest, and stands in the detail: a rate is counted from the moment when every worker has made its first shard.
The curve is of one process with all cores: harvest, and an SAE at each hook point of the shipped preset,
over 1, 4 and 16 times a corpus.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cost_curve import Cost, cost_curve, preset_runs
from benchmarks.harvesting import read_text, sequences_of
from benchmarks.overhead import interleaved, resident_mb
from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.ray_cluster import connect
from guard.models import load_model
from training.cluster.harvesting import make_on_cluster
from training.corpus import TokenSequence
from training.harvest import harvest, make_here

HOOK_NAME = "blocks.14.hook_resid_post"
WORKER = "ray::MapWorker"  # as Ray Data names the processes of its actors; Linux keeps 15 characters


class Arm(NamedTuple):
    """Who harvests."""

    workers: int
    """Of a cluster, with one core and one thread each; 0 for this process alone, with a thread for each core."""
    cores: int
    """That everything together may use."""


ARMS = {
    "here_1_core": Arm(0, 1),
    "here_2_cores": Arm(0, 2),
    "ray_1_worker": Arm(1, 2),
    "ray_1_worker_1_core": Arm(1, 1),
    "ray_2_workers": Arm(2, 2),
}


class ScaleBench:
    """Harvests of the same sequences; each gives its rate, and remembers how long it took to start."""

    def __init__(self, model: Any, sequences: Sequence[TokenSequence], shard_tokens: int, scratch: Path) -> None:
        self.model = model
        self.sequences = sequences
        self.shard_tokens = shard_tokens
        self.scratch = scratch
        self.start_seconds: dict[str, list[float]] = {}

    def rate(self, name: str) -> float:
        """Tokens a second after the first shard of each worker."""
        workers, cores = ARMS[name]
        counted: list[int] = []
        skipped = max(1, workers)

        def on_shard(done: int, _total: int, tokens: int) -> None:
            counted.append(tokens)
            if done == skipped and workers:
                pin_workers(workers)

        torch.set_num_threads(1 if workers else cores)  # what this process has, its workers have
        began = time.time()
        with (
            tempfile.TemporaryDirectory(dir=self.scratch) as folder,
            pinned(cores),  # before the cluster, whose processes inherit it
            connect("local") if workers else nullcontext(),
        ):
            harvest(
                self.model,
                self.sequences,
                (HOOK_NAME,),
                Path(folder) / "cache",
                fingerprint={"model": "embedded"},
                shard_tokens=self.shard_tokens,
                make=partial(make_on_cluster, max_workers=workers) if workers else make_here,
                on_shard=on_shard,
            )
            # Not when a shard was reported: one process reports it once the next is computed
            made = sorted(path.stat().st_mtime for path in (Path(folder) / "cache").glob("shard-*"))
        rate = (counted[-1] - counted[skipped - 1]) / (made[-1] - made[skipped - 1])
        self.start_seconds.setdefault(name, []).append(made[skipped - 1] - began)
        print(f"{name}: {rate:,.0f} tokens/s, the first after {made[skipped - 1] - began:.1f} s", flush=True)
        return rate


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keep this thread, and what it starts, to so many of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_workers(workers: int) -> None:
    """Give each worker of the cluster a core of its own."""
    found = []
    for name in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # it has ended
            if name.read_text().startswith(WORKER):
                found.append(name.parent)
    if len(found) != workers:
        raise RuntimeError(f"{len(found)} processes are called {WORKER}..., {workers} were expected")
    for process, core in zip(found, sorted(os.sched_getaffinity(0)), strict=False):
        for thread in (process / "task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def figures_of(rates: dict[str, list[float]]) -> dict[str, Figure]:
    """Medians over the rounds of one arm's rate over another's."""

    def median(above: str, below: str) -> Figure:
        quotients = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        return Figure(value=round(statistics.median(quotients), 4), unit="ratio", n=len(quotients))

    return {
        "ray_overhead": median("here_1_core", "ray_1_worker"),
        "ray_overhead_1_core": median("here_1_core", "ray_1_worker_1_core"),
        "ray_overhead_2_cores": median("here_2_cores", "ray_2_workers"),
        "harvest_2_workers_vs_1": median("ray_2_workers", "ray_1_worker"),
    }


def curve_figures(costs: Sequence[Cost]) -> dict[str, Figure]:
    """What a token costs in the largest corpus, and how much more or less that is than in the smallest."""
    first, last = costs[0], costs[-1]
    found = {
        "harvest_tokens_per_s": Figure(value=round(last.tokens / last.harvest_seconds, 1), unit="tokens/s"),
        "train_tokens_per_s": Figure(value=round(last.tokens / last.train_seconds, 1), unit="tokens/s"),
        "bytes_per_token": Figure(value=round(last.bytes / last.tokens, 1), unit="bytes"),
    }
    for stage in ("harvest", "train"):
        each = [getattr(cost, f"{stage}_seconds") / cost.tokens for cost in (first, last)]
        found[f"{stage}_cost_per_token_16x_vs_1x"] = Figure(value=round(each[1] / each[0], 4), unit="ratio")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a folder of JSON lines, besides the project's text")
    parser.add_argument("--tokens", type=int, default=98_000)
    parser.add_argument("--shard-tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve-tokens", type=int, default=320_000, help="of the largest corpus of the curve")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    loaded = load_model(device="cpu")
    text = read_text(options.data)
    before = resident_mb()
    started = time.perf_counter()
    corpus, _ = sequences_of(text, loaded.tokenizer, options.curve_tokens)
    tokens = sum(len(sequence.ids) for sequence in corpus)
    prepared = {
        "tokenise_tokens_per_s": Figure(value=round(tokens / (time.perf_counter() - started), 1), unit="tokens/s"),
        "memory_bytes_per_token": Figure(value=round((resident_mb() - before) * 1e6 / tokens, 1), unit="bytes"),
    }
    sequences, _ = sequences_of(text, loaded.tokenizer, options.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        costs = cost_curve(loaded.model, corpus, preset_runs(), Path(scratch))
        bench = ScaleBench(loaded.model, sequences, options.shard_tokens, Path(scratch))
        rates = interleaved({name: partial(bench.rate, name) for name in ARMS}, options.rounds)
    detail = {
        "curve": [cost._asdict() for cost in costs],
        "tokens": sum(len(s.ids) for s in sequences),
        "hook_name": HOOK_NAME,
        "shard_tokens": options.shard_tokens,
        "tokens_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "start_seconds": {name: [round(s, 2) for s in found] for name, found in bench.start_seconds.items()},
    }
    figures = {**figures_of(rates), **curve_figures(costs), **prepared}
    print(write_result("scale", figures, detail, packages=["ray"], folder=options.out))


if __name__ == "__main__":
    main()

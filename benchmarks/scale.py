"""What Ray costs a harvest, what a second worker gains, and how costs grow with the corpus.

    python -m benchmarks.scale [--data FOLDER] [--tokens 120000] [--rounds 3] [--curve-tokens 320000]

Tokens a second are of one process, and of 1 and 2 workers. All these arms compute with one thread, on a cluster of this
machine, over the same sequences; they take turns, and a ratio is of one round. What a worker needs to start is a cost
of its own, once a harvest, and stands in the detail: a rate is counted from the moment when every worker has made its
first shard. The curve is of one process with all cores: harvest, and an SAE at each hook point of the shipped preset,
over 1, 4 and 16 times a corpus.
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
    parser.add_argument("--tokens", type=int, default=120_000)
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
        torch.set_num_threads(1)
        with connect("local"):
            bench = ScaleBench(loaded.model, sequences, Path(scratch))
            rates = interleaved(bench.arms(), options.rounds)
    detail = {
        "curve": [cost._asdict() for cost in costs],
        "tokens": sum(len(s.ids) for s in sequences),
        "hook_name": HOOK_NAME,
        "shard_tokens": SHARD_TOKENS,
        "threads_of_a_worker": 1,
        "tokens_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "start_seconds": {name: [round(s, 2) for s in found] for name, found in bench.start_seconds.items()},
    }
    figures = {**figures_of(rates), **curve_figures(costs), **prepared}
    print(write_result("scale", figures, detail, packages=["ray"], folder=options.out))


if __name__ == "__main__":
    main()

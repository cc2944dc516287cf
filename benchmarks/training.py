"""Our SAE trainer beside sae-lens, dictionary_learning and sparsify: speed, quality at equal tokens, and the harvest.

    python -m benchmarks.training [--work FOLDER] [--data FOLDER] [--repeats 9] [--tokens 500000] [--docs]

One process, one cache of the embedded model's activations, the same batches in the same order for every arm. Install
the peers first: `pip install --no-deps -r benchmarks/requirements-peers.txt`, besides the project itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs import QWEN_PLAN, SMOLLM2, SaeShape, device_floor, plan
from benchmarks.harvesting import HarvestBench, cached_rows, read_text, sequences_of
from benchmarks.overhead import interleaved, ratios, spread
from benchmarks.peers import ARMS, HOOK_NAME, PACKAGES, Setting
from benchmarks.results import RESULTS, Figure, write_result
from benchmarks.trainers import (
    OURS,
    measure_quality,
    measure_speed,
    quality_ratios,
    schedule,
    speed_ratios,
    wait,
)

PARTS = ("speed", "quality", "harvest", "cuda")
DEFAULT = Setting(
    d_in=576,
    d_sae=4608,
    k=32,
    batch_tokens=2048,
    steps=1000,
    lr=1.2e-3,
    warmup_steps=50,
    decay_steps=300,
    dead_after_tokens=10_000_000,  # the default of dictionary_learning and sparsify
)
CUDA_SETTING = replace(DEFAULT, d_in=2048, d_sae=20_480, k=64, batch_tokens=8192, device="cuda")


# ---- an accelerator ----------------------------------------------------------------------------------------


def measure_cuda(setting: Setting, repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Tokens/s at a large model's width beside sae-lens, in float32 and with bfloat16 products, and the floor.

    The activations are made up: Gaussian, of falling variance. Their values decide nothing about the time.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    scale = torch.linspace(2.0, 0.2, setting.d_in)
    rows = torch.randn(16 * setting.batch_tokens, setting.d_in, generator=generator) * scale
    sae = SaeShape(d_in=setting.d_in, d_sae=setting.d_sae, k=setting.k, batch_tokens=setting.batch_tokens)
    found: dict[str, Any] = {"shape": asdict(sae)}
    for precision, autocast in (("float32", False), ("bfloat16", True)):
        own = replace(setting, autocast=autocast)
        usable = [n for n in names if not (autocast and ARMS[n][1] == "create_sparse")]
        speeds = measure_speed(rows, own, usable, repeats)
        rates = _device_rates(torch.bfloat16 if autocast else torch.float32)
        found[precision] = {
            "tokens_per_s": {name: spread(values) for name, values in speeds.items()},
            "ratios": speed_ratios(speeds),
            "rates": rates,
            "floor_tokens_per_s": dict(device_floor(sae, **rates)),
        }
    return found


def _device_rates(dtype: torch.dtype) -> dict[str, float]:
    """Operations/s of a large product and bytes/s of a large copy, the best of ten each."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    big = torch.empty(2**28, device="cuda")
    other = torch.empty_like(big)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            wait()
            started = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - started)
        return min(times)

    return {
        "operations": 2 * 8192**3 / best(lambda: a @ a),
        "bandwidth": 2 * 4 * big.numel() / best(lambda: other.copy_(big)),
    }


# ---- all of it ---------------------------------------------------------------------------------------------


def arm_names(libraries: Sequence[str]) -> list[str]:
    """Our arms and those of the libraries named. Raises ValueError for an unknown one."""
    unknown = set(libraries) - set(PACKAGES)
    if unknown:
        raise ValueError(f"unknown peers {', '.join(sorted(unknown))}; there are {', '.join(PACKAGES)}")
    return [name for name, (library, _, _) in ARMS.items() if library == OURS or library in libraries]


class Benchmark:
    """The parts that were asked for, gathered into figures and detail."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        from guard import load_model

        self.options = options
        self.names = arm_names(options.peers)
        self.figures: dict[str, Figure] = {}
        self.detail: dict[str, Any] = {}
        loaded = load_model(dtype="float32", device="cpu")
        documents = read_text(options.data)
        train, held_out = sequences_of(documents, loaded.tokenizer, options.cache_tokens)
        self.model, self.work = loaded.model, work
        self.sequences = train
        self.rows = cached_rows(loaded.model, train, work / "train", print)
        self.held_out = cached_rows(loaded.model, held_out, work / "held_out", print)
        self.detail["data"] = {
            "hook_name": HOOK_NAME,
            "files": sorted({d.source for d in documents}),
            "train_rows": len(self.rows),
            "held_out_rows": len(self.held_out),
        }

    def speed(self) -> None:
        """Tokens/s before any feature dies."""
        speeds = measure_speed(self.rows, DEFAULT, self.names, self.options.repeats)
        found = speed_ratios(speeds)
        self.detail["speed"] = {
            "setting": asdict(DEFAULT),
            "tokens_per_s": {name: spread(values) for name, values in speeds.items()},
            "ratios": found,
        }
        for name, values in speeds.items():
            self._figure(f"tokens_per_s_{name}", spread(values)["median"], "tokens/s", len(values))
        for key, about in found.items():
            self._figure(key, about["median"], "ratio", about["n"])

    def quality(self) -> None:
        """FVU after the same tokens."""
        names = [name for name in self.names if ARMS[name][1] == "create"]
        options = self.options
        found = measure_quality(self.rows, self.held_out, DEFAULT, names, options.lrs, options.tokens)
        compared = quality_ratios(found)
        setting = schedule(DEFAULT, options.tokens, options.lrs[0])
        self.detail["quality"] = {"setting": asdict(setting), "arms": found, "ratios": compared}
        for name, by_lr in found.items():
            self._figure(f"fvu_{name}", min(q["fvu"] for q in by_lr.values()), "FVU", len(self.held_out))
        for family, about in compared.items():
            self._figure(f"fvu_vs_best_{family}", about["value"], "ratio", len(self.held_out))
        if compared:
            worst = max(about["value"] for about in compared.values())
            self._figure("fvu_vs_best", worst, "ratio", len(self.held_out))

    def harvest(self) -> None:
        """Our harvest beside the bare model."""
        taken, kept = 0, []
        for sequence in self.sequences:
            if taken >= self.options.harvest_tokens:
                break
            kept.append(sequence)
            taken += len(sequence.ids)
        bench = HarvestBench(self.model, kept, self.work / "timed")
        seconds = interleaved(bench.arms(), self.options.harvest_repeats)
        found = {name: spread(values) for name, values in ratios(seconds, "harvest").items()}
        speeds = {name: spread([bench.tokens / s for s in values]) for name, values in seconds.items()}
        self.detail["harvest"] = {
            "tokens": bench.tokens,
            "mean_tokens_a_document": bench.tokens / len(kept),
            "ratios": found,
            "tokens_per_s": speeds,
        }
        for arm in ("bare_truncated", "full", "full_with_head"):
            self._figure(f"harvest_vs_{arm}", found[arm]["median"], "ratio", self.options.harvest_repeats)
        self._figure("tokens_per_s_harvest", speeds["harvest"]["median"], "tokens/s", self.options.harvest_repeats)

    def cuda(self) -> None:
        """The accelerator, where there is one."""
        if not torch.cuda.is_available():
            self.detail["cuda"] = None
            return
        names = [name for name in self.names if ARMS[name][0] in (OURS, "sae_lens")]
        found = self.detail["cuda"] = measure_cuda(CUDA_SETTING, self.options.repeats, names)
        for precision in ("float32", "bfloat16"):
            for name, values in found[precision]["tokens_per_s"].items():
                self._figure(f"cuda_{precision}_tokens_per_s_{name}", values["median"], "tokens/s", values["n"])
            for key, about in found[precision]["ratios"].items():
                self._figure(f"cuda_{precision}_{key}", about["median"], "ratio", about["n"])

    def costs(self) -> None:
        """The plan for a larger model, if both of its rates were measured."""
        if not {"speed", "harvest"} <= self.detail.keys():
            return
        gpu = self.detail.get("cuda")
        harvested = self.detail["harvest"]
        self.detail["plan"] = plan(
            QWEN_PLAN,
            harvest_rate=harvested["tokens_per_s"]["harvest"]["median"],
            train_rate=self.detail["speed"]["tokens_per_s"][f"{OURS}_topk"]["median"],
            measured_model=SMOLLM2,
            measured_layers=int(HOOK_NAME.split(".")[1]) + 1,
            measured_context=round(harvested["mean_tokens_a_document"]),
            measured_sae=SaeShape(
                d_in=DEFAULT.d_in, d_sae=DEFAULT.d_sae, k=DEFAULT.k, batch_tokens=DEFAULT.batch_tokens
            ),
            gpu_train_rate=gpu and gpu["bfloat16"]["tokens_per_s"][f"{OURS}_topk"]["median"],
        )

    def run(self) -> None:
        """The parts in order, then the plan."""
        for part in self.options.parts:
            getattr(self, part)()
            print(part, {k: f.value for k, f in self.figures.items()}, flush=True)
        self.costs()

    def _figure(self, key: str, value: float, unit: str, n: int) -> None:
        self.figures[key] = Figure(value=float(f"{value:.5g}"), unit=unit, n=n)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the activations for the next time")
    parser.add_argument("--data", type=Path, help="folder of *.jsonl[.gz] with more text than the project's own")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the speed comparison")
    parser.add_argument("--tokens", type=int, default=500_000, help="tokens of each run of the quality comparison")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1.2e-3, 3e-3], help="learning rates; the best counts")
    parser.add_argument("--cache-tokens", type=int, default=250_000, help="rows to harvest, at most")
    parser.add_argument("--harvest-tokens", type=int, default=24_000, help="tokens of a timed harvest")
    parser.add_argument("--harvest-repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args(arguments)
    for name in ("repeats", "tokens", "cache_tokens", "harvest_tokens", "harvest_repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.tables import update

    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Benchmark(options, options.work or Path(scratch))
        bench.run()
    bench.detail |= {"threads": torch.get_num_threads(), "dtype": "float32", "parts": options.parts}
    packages = [package for library, package in PACKAGES.items() if library in options.peers]
    print(write_result("training", bench.figures, bench.detail, packages=packages, folder=options.out))
    if options.docs:
        update("training", options.out)


if __name__ == "__main__":
    main()

"""The tables of docs/vllm.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.results import Result
from benchmarks.tables import markdown


def vllm_tables(result: Result) -> str:
    """What docs/vllm.md shows of the costs."""
    detail = result.detail
    lines = [
        f"{result.date}; {result.machine.cores} cores, of which vLLM gives the model one, "
        f"{result.machine.memory_gb:g} GB; "
        f"vLLM {result.versions.get('vllm', '?')}, {detail['tokens']} tokens an answer, policy `{detail['policy']}`, "
        "medians of the rounds.",
        "",
    ]
    heading = ("mode, clients", "tokens/s without", "with / without", "naive / without")
    rows: list[Sequence[object]] = []
    times: list[Sequence[object]] = []
    for mode, measured in detail["modes"].items():
        for clients, runs in measured["concurrency"].items():
            figures = [result.figures.get(f"{mode}_c{clients}{suffix}") for suffix in ("", "_naive")]
            plain = median(run["tokens_per_second"] for run in runs["unguarded"])
            shares = [None if figure is None else f"{figure.value:.3f}" for figure in figures]
            rows.append((f"{mode}, {clients}", f"{plain:.1f}", *shares))
            for arm in ("unguarded", "guarded"):
                of = [
                    f"{median(run[what][q] for run in runs[arm]):.0f}"
                    for what in ("ttft_ms", "between_ms")
                    for q in ("p50", "p99")
                ]
                times.append((f"{mode}, {clients}, {arm}", *of))
    lines.append(markdown(heading, rows))
    lines += ["", "Milliseconds to the first token, and between tokens:", ""]
    lines.append(markdown(("mode, clients, arm", "first p50", "first p99", "between p50", "between p99"), times))
    return "\n".join(lines)

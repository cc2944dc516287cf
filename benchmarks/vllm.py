"""What the guard costs inside vLLM: throughput with it over the same without it, eager and compiled.

    python -m benchmarks.vllm [--tokens 128] [--rounds 3] [--modes eager,compiled]

Every arm is an engine of its own under the same load. They take turns second by second: all but one stand still
(SIGSTOP), and only the time in which an engine ran counts for it, so that a machine that slows down for a while does so
for all. Beside the guard stands the naive way, Python hooks that encode a whole SAE; compiled, its hooks do not fire,
and it is left out there once that was seen.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.results import Figure, write_result
from guard.models import embedded_folder

CONCURRENCY = (1, 8, 32)
TURN = 1.0  # seconds
POLICY = "balanced"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Arm:
    """One engine; it stands still unless it is its turn."""

    def __init__(self, name: str, *, eager: bool, guarded: bool, naive: bool, log: Path) -> None:
        options: dict[str, Any] = {
            "model": str(embedded_folder()),
            "max_model_len": 1024,
            "max_num_seqs": 32,
            "enforce_eager": eager,
        }
        environ = {k: v for k, v in os.environ.items() if not k.startswith("SAILGUARD_") or k == "SAILGUARD_CACHE"}
        environ |= ENVIRONMENT
        if guarded:
            environ |= {"SAILGUARD_BANK": "shipped", "SAILGUARD_POLICY": POLICY}
            options["worker_extension_cls"] = "guard.engines.vllm.required.Guarded"
        command = [sys.executable, "-m", "benchmarks.vllm_engine", json.dumps(options), *(["hooks"] if naive else [])]
        self.name = name
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environ,
                start_new_session=True,
            )
        self._read()
        time.sleep(1)  # what it still does once it is ready
        self._halt()

    def ask(self, command: Any) -> Any:
        """The answer to a command, with all other engines standing still."""
        (answer,) = race([self], command).values()
        return answer[0]

    def order(self, command: Any) -> None:
        """Give it a command, which it reads when its turn comes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def turn(self, seconds: float) -> tuple[Any, tuple[float, float]]:
        """Let it run. Returns its answer, or None if it has none yet, and from when to when it ran."""
        began = time.monotonic()
        os.killpg(self._process.pid, signal.SIGCONT)
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        answer = self._read() if ready else None
        self._halt()
        return answer, (began, time.monotonic())

    def close(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _halt(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"benchmarks.vllm: the engine {self.name!r} ended; its log says why")
        return json.loads(line)


Turns = list[tuple[float, float]]


def race(arms: Sequence[Arm], command: Any) -> dict[str, tuple[Any, Turns]]:
    """The same command to all arms, which take turns until each has answered: its answer, and when it ran."""
    for arm in arms:
        arm.order(command)
    turns: dict[str, Turns] = {arm.name: [] for arm in arms}
    found: dict[str, tuple[Any, Turns]] = {}
    number = 0
    while len(found) < len(arms):
        for arm in (*arms[number % len(arms) :], *arms[: number % len(arms)]):
            if arm.name not in found:
                answer, ran = arm.turn(TURN)
                turns[arm.name].append(ran)
                if answer is not None:
                    found[arm.name] = answer, turns[arm.name]
        number += 1
    return found


def own_time(turns: Turns, moment: float) -> float:
    """Seconds that an engine had run up to a moment of the machine's clock."""
    return sum(min(stop, moment) - start for start, stop in turns if start < moment)


def summary(answers: Sequence[dict[str, Any]], turns: Turns) -> dict[str, Any]:
    """Throughput, and what the clients waited for, by the engine's own time."""
    first, between = [], []
    tokens = 0
    for answer in answers:
        asked = own_time(turns, answer["asked"])
        times = [(own_time(turns, moment), n) for moment, n in answer["came"]]
        first.append(1000 * (times[0][0] - asked))
        for (before, _), (after, n) in pairwise(times):
            between += [1000 * (after - before) / n] * n
        tokens += sum(n for _, n in times)
    began = min(own_time(turns, answer["asked"]) for answer in answers)
    ended = max(own_time(turns, answer["ended"]) for answer in answers)
    return {
        "tokens_per_second": tokens / (ended - began),
        "ttft_ms": {f"p{q}": float(np.percentile(first, q)) for q in (50, 99)},
        "between_ms": {f"p{q}": float(np.percentile(between, q)) for q in (50, 99)},
    }


def measure(mode: str, *, tokens: int, rounds: int, folder: Path) -> dict[str, Any]:
    """All arms of one mode at every concurrency: what each round gave."""
    with ExitStack() as stack:
        arms: list[Arm] = []
        for name in ("unguarded", "guarded", "naive"):
            arm = Arm(
                name,
                eager=mode == "eager",
                guarded=name == "guarded",
                naive=name == "naive",
                log=folder / f"{mode}_{name}.log",
            )
            stack.callback(arm.close)
            arms.append(arm)
        arms[-1].ask({"concurrency": 1, "requests": 1, "tokens": 8})
        fired = arms[-1].ask("fired")
        if not fired:  # there is nothing to compare with
            arms.pop()
        found: dict[str, Any] = {}
        for concurrency in CONCURRENCY:
            command = {"concurrency": concurrency, "requests": concurrency, "tokens": tokens}
            race(arms, {**command, "tokens": 32})  # it warms up
            kept: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
            shorter = CONCURRENCY.index(concurrency)  # what takes longer is repeated less often
            for number in range(max(1, 2 * rounds >> shorter)):
                turned = [*arms[number % len(arms) :], *arms[: number % len(arms)]]
                for name, (answers, turns) in race(turned, command).items():
                    kept[name].append(summary(answers, turns))
            found[str(concurrency)] = kept
            for name, runs in kept.items():
                print(mode, concurrency, name, [round(run["tokens_per_second"], 2) for run in runs], flush=True)
    return {"naive_hooks_fired": fired, "concurrency": found}


def ratio(runs: dict[str, Sequence[dict[str, Any]]], arm: str) -> list[float]:
    """Round by round, an arm's throughput over the unguarded one's."""
    pairs = zip(runs[arm], runs["unguarded"], strict=True)
    return [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args(argv)
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {"tokens": given.tokens, "policy": POLICY, "modes": {}}
    for mode in given.modes.split(","):
        detail["modes"][mode] = measured = measure(mode, tokens=given.tokens, rounds=given.rounds, folder=given.logs)
        for concurrency, runs in measured["concurrency"].items():
            figures[f"{mode}_c{concurrency}"] = Figure(
                value=round(median(ratio(runs, "guarded")), 4), unit="ratio", n=len(runs["guarded"])
            )
            if "naive" in runs:
                figures[f"{mode}_c{concurrency}_naive"] = Figure(
                    value=round(median(ratio(runs, "naive")), 4), unit="ratio", n=len(runs["naive"])
                )
    write_result("vllm", figures, detail, packages=("vllm",))


if __name__ == "__main__":
    main()

"""How long one `sailguard train` takes from text to bank, stage by stage, and how much memory.

    python -m benchmarks.bank_training --data DIR --out BANK [--docs]
    python -m benchmarks.bank_training --log FILE --out BANK [--docs]

The first runs the command on `fit.jsonl.gz` and `general.jsonl.gz` of DIR, in a work folder that must not exist, and
keeps what it said beside it. The second reads what such a run said under GNU `time -v`, its standard error.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.bank import Bank
from feature_bank.errors import DataError

PRESET = "smollm2-135m"
_ENDED = re.compile(r"^ *(\d+) s  ([^:]+?): (.*)$")
_UNFINISHED = re.compile(r" \d+/\d+$")
_WALL = re.compile(r"Elapsed \(wall clock\) time .*: (?:(\d+):)?(\d+):(\d+(?:\.\d+)?)$")
_PEAK = re.compile(r"Maximum resident set size \(kbytes\): (\d+)$")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the command."""

    stages: dict[str, int]
    """Seconds from the end of the stage before to the stage's own end, in order."""
    seconds: float
    peak_gb: float


def stage_seconds(lines: Iterable[str]) -> dict[str, int]:
    """What the progress lines say; the SAEs of all hook points are one stage. Raises DataError if they say nothing."""
    ends: dict[str, int] = {}
    for line in lines:
        match = _ENDED.match(line.rstrip())
        if match is None or _UNFINISHED.search(match[2]):
            continue
        ends["sae" if match[2].startswith("sae ") else match[2]] = int(match[1])
    if not ends:
        raise DataError("no stage has ended in what the run said; is it the standard error of `sailguard train`?")
    found, before = {}, 0
    for stage, end in sorted(ends.items(), key=lambda item: item[1]):
        found[stage], before = end - before, end
    return found


def read_log(path: Path) -> Run:
    """The run whose standard error, GNU time's lines at its end, lies in a file. Raises DataError without them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    walls = [match for line in lines if (match := _WALL.search(line))]
    peaks = [match for line in lines if (match := _PEAK.search(line))]
    if not walls or not peaks:
        raise DataError(f"{path.name}: the lines of GNU `time -v` are missing")
    hours, minutes, seconds = walls[-1].groups(default="0")
    return Run(
        stages=stage_seconds(lines),
        seconds=3600 * int(hours) + 60 * int(minutes) + float(seconds),
        peak_gb=int(peaks[-1][1]) * 1024 / 1e9,
    )


def train(data: Path, out: Path) -> Run:
    """Run the command. Raises DataError if it fails or would go on from an earlier run's work."""
    work = out.with_name(f"{out.name}.work")
    if work.exists():
        raise DataError(f"{work} exists: the run would not start from nothing")
    files = [str(data / name) for name in ("fit.jsonl.gz", "general.jsonl.gz")]
    command = [sys.executable, "-m", "service.cli", "train", "--preset", PRESET, "--data", *files, "--out", str(out)]
    log = out.with_name(f"{out.name}.log")
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as said:
        failed = subprocess.run(command, stderr=said, check=False).returncode
    seconds = time.monotonic() - began
    if failed:
        raise DataError(f"`sailguard train` ended with {failed}; {log} has what it said")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return Run(stages=stage_seconds(log.read_text(encoding="utf-8").splitlines()), seconds=seconds, peak_gb=peak)


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bank_training", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with fit.jsonl.gz and general.jsonl.gz")
    source.add_argument("--log", type=Path, help="standard error of a run that was made under GNU `time -v`")
    parser.add_argument("--out", type=Path, required=True, help="the bank that is (or was) made")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--docs", action="store_true", help="put the figures into docs/training.md")
    options = parser.parse_args(arguments)
    run = train(options.data, options.out) if options.log is None else read_log(options.log)
    bank = Bank.load(options.out)
    figures = {
        "train_minutes": Figure(value=round(run.seconds / 60, 2), unit="min", n=1),
        "train_peak_gb": Figure(value=round(run.peak_gb, 2), unit="GB", n=1),
    }
    detail = {
        "preset": PRESET,
        "stages": run.stages,
        "bank": {"version": bank.version, "content_hash": bank.content_hash, "features": len(bank.features)},
        "described": bank.manifest.quality["described"],
        "rows": {record.name: record.rows for record in bank.manifest.corpus},
    }
    print(write_result("bank_training", figures, detail, packages=("scikit-learn", "scipy"), folder=options.results))
    if options.docs:
        from benchmarks.tables import update

        update("bank_training", options.results)


if __name__ == "__main__":
    main()

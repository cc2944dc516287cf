"""A harvest that is killed, at whatever moment, and started again ends with the same bytes and no document twice.

The killed runs are children of one process that has the imports behind it and has computed nothing yet.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import training.shards
from tests.training.samples import TOY_HOOKS, contents, toy_harvest, toy_sequences
from training.cache import MANIFEST, SUMMARY

ROOT = Path(__file__).parents[2]
SEQUENCES = 60
WRITES = ["manifest", *range(4), "last shard", "outliers", "summary"]
STAGES = ["before a byte", "half written", "before the rename", "after the rename"]
MOMENTS = 12


def toy(folder: Path, **options: Any) -> Any:
    return toy_harvest(folder, sequences=toy_sequences(SEQUENCES), shard_tokens=120, **options)


def unsynced(descriptor: int) -> None:
    """In place of fsync: what a killed process wrote is in the system's hands, and disks are slow."""


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(folder: Path, write: int, stage: str) -> None:
    """Harvest, and die at one stage of the given write (counted from 0; negative ones from the end)."""
    real_replace, started = os.replace, -1

    def mine() -> bool:
        return started == write

    class File:
        """A file that counts the writes of whole files, and dies in one."""

        def __init__(self, file: BinaryIO) -> None:
            self.file, self.first = file, True

        def write(self, data: bytes) -> None:
            if mine() and stage == "before a byte":
                die()
            if mine() and stage == "half written":
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                die()
            self.file.write(data)

    real_written: Callable[[Path], Any] = training.shards.written

    def written(path: Path) -> Any:
        nonlocal started
        started += 1
        return _Wrapped(real_written(path), File)

    def replace(source: Path, target: Path) -> None:
        if mine() and stage == "before the rename":
            die()
        real_replace(source, target)
        if mine() and stage == "after the rename":
            die()

    for name in ("shards", "harvest", "outliers"):
        module: Any = sys.modules[f"training.{name}"]
        module.written = written
    os.replace = replace  # type: ignore[assignment]
    toy(folder)


class _Wrapped:
    def __init__(self, context: Any, wrap: Callable[[Any], Any]) -> None:
        self.context, self.wrap = context, wrap

    def __enter__(self) -> Any:
        return self.wrap(self.context.__enter__())

    def __exit__(self, *exc: Any) -> Any:
        return self.context.__exit__(*exc)


def main(folder: Path) -> None:
    """Kill one child at every stage of every write, and some at random moments."""
    import torch

    torch.set_num_threads(1)
    os.fsync = unsynced  # type: ignore[assignment]
    writes = {"manifest": 0, **{n: n + 1 for n in range(4)}, "last shard": -3, "outliers": -2, "summary": -1}
    total = int(sys.argv[2])  # writes of a whole run
    for name, write in writes.items():
        for stage in STAGES:
            child = os.fork()
            if not child:
                killed_at(folder / f"{name}, {stage}", write % total, stage)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, (name, stage)
    generator = random.Random(0)
    started = time.monotonic()
    child = os.fork()
    if not child:
        toy(folder / "timed")
        os._exit(0)
    os.waitpid(child, 0)
    duration = time.monotonic() - started
    for number in range(MOMENTS):
        child = os.fork()
        if not child:
            toy(folder / f"moment {number}")
            os._exit(0)
        time.sleep(generator.random() * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", unsynced)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a harvest that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    toy(folder)
    return contents(folder)


@pytest.fixture(scope="module")
def killed(whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of caches, each left behind by a run that was killed at its own moment."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.training.test_harvest_kill", str(folder), str(len(whole))]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return folder


def assert_ends_the_same(folder: Path, whole: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)  # a run may be killed before it has made it
    found = contents(folder)
    assert found == {name: whole[name] for name in found}  # what is there under its name is finished
    times = {name: (folder / name).stat().st_mtime_ns for name in found if name not in (SUMMARY, MANIFEST)}
    cache = toy(folder)
    assert contents(folder) == whole
    assert {path.name for path in folder.iterdir()} == set(whole)  # nothing temporary is left
    shards = [name for name in times if name.startswith("shard-")]
    assert {name: (folder / name).stat().st_mtime_ns for name in shards} == {name: times[name] for name in shards}
    runs = cache.documents[np.append(0, np.flatnonzero(np.diff(cache.documents)) + 1)]
    assert sorted(runs.tolist()) == [s.document for s in toy_sequences(SEQUENCES)]
    assert len(cache.activations(TOY_HOOKS[0])) == sum(len(s.positions) for s in toy_sequences(SEQUENCES))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("write", WRITES)
def test_killed_in_any_write_it_ends_the_same(
    killed: Path, whole: dict[str, bytes], write: str | int, stage: str
) -> None:
    folder = killed / f"{write}, {stage}"
    hidden = [path.name for path in folder.glob(".*.tmp")]
    assert len(hidden) == (stage != "after the rename")
    assert_ends_the_same(folder, whole)


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_any_moment_it_ends_the_same(killed: Path, whole: dict[str, bytes], moment: int) -> None:
    assert_ends_the_same(killed / f"moment {moment}", whole)


def test_killed_again_and_again_it_ends_the_same(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for shard in range(5):
        names = [MANIFEST, *(f"shard-{i:05d}.safetensors" for i in range(shard))]
        for name in names:
            (tmp_path / name).write_bytes(whole[name])
        (tmp_path / f".shard-{shard:05d}.safetensors.abc.tmp").write_bytes(b"half")
    toy(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A reader gives every usable row once a pass, in an order that seed and step alone decide, within its memory."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import training.reader
from feature_bank.errors import DataError
from tests.training.samples import LlamaForCausalLM, toy_harvest
from training.batches import inliers
from training.cache import Harvest, open_harvest, run_id, shard_path
from training.corpus import TokenSequence
from training.reader import ActivationReader
from training.shards import write_shard

ROOT = Path(__file__).parents[2]
HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
BATCH = 16
MEMORY = 12_000  # bytes: about a fifth of the cache
SINK = 7  # a token whose activations are a thousand times longer than others at the first hook point


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    """About 1,500 rows in a dozen shards, of which a few are outliers."""
    model = LlamaForCausalLM()
    model.embed[SINK] *= 1000
    generator = np.random.default_rng(0)
    sequences = []
    for index in range(120):
        ids = generator.integers(8, 64, int(generator.integers(6, 24))).tolist()
        if index % 10 == 0:
            ids[-1] = SINK
        sequences.append(TokenSequence(document=index, ids=ids, positions=np.arange(3, len(ids))))
    folder = tmp_path_factory.mktemp("cache")
    return toy_harvest(
        folder, model=model, sequences=sequences, hook_names=HOOKS, shard_tokens=130, block_rows=8, batch_tokens=256
    )


def reader(cache: Harvest, hook_names: tuple[str, ...] = HOOKS, **options: Any) -> ActivationReader:
    arguments: dict[str, Any] = {"batch_tokens": BATCH, "seed": 5, "block_tokens": 8, "memory_bytes": MEMORY}
    return ActivationReader(cache, hook_names, **{**arguments, **options})


def take(batches: Iterator[dict[str, Tensor]], n: int) -> list[dict[str, Tensor]]:
    return list(itertools.islice(batches, n))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def row_numbers(cache: Harvest, batches: list[dict[str, Tensor]]) -> list[list[int]]:
    """Which rows of the cache the rows of the batches are; those of all hook points must be one row's."""
    both = torch.cat([cache.activations(name) for name in HOOKS], dim=1).float()
    wanted = usable(cache)
    number = {tuple(row): index for index, row in enumerate(both.tolist()) if index in wanted}
    assert len(number) == len(wanted)  # or rows could not be told apart
    return [[number[tuple(row)] for row in torch.cat([b[name] for name in HOOKS], dim=1).tolist()] for b in batches]


def usable(cache: Harvest) -> set[int]:
    kept = [inliers(cache.activations(name)) for name in HOOKS]
    return set(torch.nonzero(kept[0] & kept[1]).flatten().tolist())


def test_the_cache_is_larger_than_the_bound_and_has_outliers(cache: Harvest) -> None:
    bytes_held = sum(path.stat().st_size for path in cache.shards)
    assert bytes_held > 4 * MEMORY
    assert len(cache.shards) > 10
    assert 0 < len(cache.outliers(HOOKS[0])) != len(cache.outliers(HOOKS[1]))
    assert reader(cache).order["windows"] > 5


@pytest.mark.parametrize("options", [{}, {"memory_bytes": 10**9}, {"block_tokens": 40}, {"batch_tokens": 100}])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_pass_holds_every_usable_row_once_at_all_hook_points(
    cache: Harvest, options: dict[str, int], prefetch: bool
) -> None:
    found = reader(cache, prefetch=prefetch, **options)
    expected = usable(cache)
    assert found.tokens == len(expected)
    assert found.outliers == cache.tokens - len(expected) > 0
    assert found.steps_per_epoch == len(expected) // found.batch_tokens
    passes = []
    for epoch in range(2):
        batches = take(found.batches(epoch * found.steps_per_epoch), found.steps_per_epoch)
        assert all(
            b[n].shape == (found.batch_tokens, 8) and b[n].dtype == torch.float32 for b in batches for n in HOOKS
        )
        rows = [row for batch in row_numbers(cache, batches) for row in batch]
        assert len(set(rows)) == len(rows) == found.steps_per_epoch * found.batch_tokens
        assert set(rows) <= expected
        passes.append(rows)
    assert passes[0] != passes[1]


def test_the_order_is_mixed_across_the_cache(cache: Harvest) -> None:
    found = reader(cache)
    batches = row_numbers(cache, take(found.batches(0), found.steps_per_epoch))
    shard_of_row = np.repeat(np.arange(len(cache.shards)), cache.shard_rows)
    assert np.mean([len(set(shard_of_row[batch])) for batch in batches]) > 4
    whole = reader(cache, memory_bytes=10**9)  # what fits is shuffled as a whole
    mixed = row_numbers(cache, take(whole.batches(0), whole.steps_per_epoch))
    assert np.mean([len(set(shard_of_row[batch])) for batch in mixed]) > 7


@pytest.mark.parametrize("memory", [MEMORY, 10**9])
@pytest.mark.parametrize("prefetch", [True, False])
def test_started_at_any_step_it_goes_on_as_if_it_had_never_stopped(cache: Harvest, memory: int, prefetch: bool) -> None:
    steps = 2 * reader(cache).steps_per_epoch + 5
    whole = take(reader(cache, memory_bytes=memory).batches(0), steps)
    assert len({tuple(batch[HOOKS[0]][0].tolist()) for batch in whole}) > steps // 2
    per_pass = reader(cache).steps_per_epoch
    for start in (1, per_pass // 2, per_pass - 1, per_pass, per_pass + 1, 2 * per_pass + 1):
        again = take(reader(cache, memory_bytes=memory, prefetch=prefetch).batches(start), steps - start)
        assert all(map(same, again, whole[start:]))


def test_the_order_depends_on_the_seed_and_is_named(cache: Harvest) -> None:
    base = reader(cache)
    for change in ({"seed": 6}, {"memory_bytes": 2 * MEMORY}, {"block_tokens": 16}):
        other = reader(cache, **change)
        assert json.loads(json.dumps(other.order)) != json.loads(json.dumps(base.order))
        assert not same(next(other.batches(0)), next(base.batches(0)))
    assert reader(cache, prefetch=False).order == base.order


def test_two_iterators_of_one_reader_do_not_meet(cache: Harvest) -> None:
    found = reader(cache)
    alone = take(found.batches(0), 20)
    for expected, *both in zip(alone, found.batches(0), found.batches(0), strict=False):
        assert all(same(batch, expected) for batch in both)


def test_one_hook_point_has_its_own_outliers_only(cache: Harvest) -> None:
    for name in HOOKS:
        found = reader(cache, (name,))
        assert found.tokens == cache.tokens - len(cache.outliers(name))
        assert list(next(found.batches(0))) == [name]


def test_rows_may_be_chosen(cache: Harvest) -> None:
    keep = cache.documents % 2 == 1
    found = reader(cache, keep=keep)
    expected = usable(cache) & set(np.flatnonzero(keep).tolist())
    assert found.tokens == len(expected)
    rows = {r for batch in row_numbers(cache, take(found.batches(0), found.steps_per_epoch)) for r in batch}
    assert rows <= expected
    assert len(rows) == found.steps_per_epoch * BATCH
    with pytest.raises(DataError, match="'keep' has the shape"):
        reader(cache, keep=keep[1:])


@pytest.mark.parametrize("n", [1, 10, 333, 10**6])
def test_a_sample_is_spread_evenly_over_usable_rows(cache: Harvest, n: int) -> None:
    expected = sorted(usable(cache))
    (rows,) = row_numbers(cache, [reader(cache).sample(n)])
    n = min(n, len(expected))
    assert rows == [expected[i * len(expected) // n] for i in range(n)]


def test_a_sample_of_a_large_cache_reads_few_blocks(cache: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.reader, "_SAMPLE_BLOCKS", 20)
    (rows,) = row_numbers(cache, [reader(cache).sample(100)])
    assert rows == sorted(set(rows))
    assert len(rows) == 100
    assert set(rows) <= usable(cache)
    parts = np.searchsorted(np.linspace(0, cache.tokens, 11), rows, side="right")
    assert set(parts) == set(range(1, 11))


# ---- memory --------------------------------------------------------------------------------------------------------


def test_what_is_held_at_a_time_is_bounded(cache: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.empty

    def empty(*shape: Any, **options: Any) -> Tensor:
        found = real(*shape, **options)
        made.append(found.numel() * found.element_size())
        return found

    for memory in (MEMORY, 2 * MEMORY, 10**9):
        found = reader(cache, memory_bytes=memory)
        assert found.buffer_bytes <= memory
        monkeypatch.setattr(torch, "empty", empty)
        made.clear()
        take(found.batches(0), 3 * found.steps_per_epoch)
        monkeypatch.undo()
        batches = [n for n in made if n == BATCH * 8 * 4]
        buffers = [n for n in made if n != BATCH * 8 * 4]
        assert len(batches) >= 3 * found.steps_per_epoch * len(HOOKS)
        assert len(buffers) == len(HOOKS) * (1 if found.order["windows"] == 1 else 2)  # made once, used for all passes
        assert sum(buffers) <= found.buffer_bytes <= memory


def test_a_bound_that_nothing_fits_in_is_refused(cache: Harvest) -> None:
    with pytest.raises(DataError, match=r"memory_bytes is 1,000, but one batch and two blocks take [\d,]+; raise it"):
        reader(cache, memory_bytes=1000)


def sparse_cache(folder: Path, shards: int, rows: int, d_in: int) -> Harvest:
    """A large cache that takes no room: its activations are zeros, and its files hard links to one another."""
    hook = HOOKS[0]
    manifest = {"format": "sailguard activations 1", "hook_names": [hook], "block_rows": 256, "shards": shards}
    folder.mkdir()
    (folder / "harvest.json").write_text(json.dumps(manifest))
    run = run_id(manifest)
    zeros = {hook: torch.zeros(rows, d_in, dtype=torch.bfloat16)}
    for number in range(shards):
        path = shard_path(folder, number)
        write_shard(path, zeros, run=run, number=number, block_rows=256)
        size = path.stat().st_size
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(header)  # what is past the end reads as zeros once the file is long again
            file.truncate(size)
    summary = {
        "run": run,
        "hook_points": {hook: {"d_in": d_in, "median_length": 1.0, "outliers": 0}},
        "shards": [{"rows": rows, "bytes": shard_path(folder, n).stat().st_size} for n in range(shards)],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "outliers.safetensors").open("wb") as file:
        training.shards.write_safetensors(file, {hook: torch.empty(0, dtype=torch.int64)}, {})
    return open_harvest(folder)


def growth_while_reading(folder: Path, memory: int) -> None:
    """Print by how many bytes the process grew at most while it read a whole cache."""

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    cache = open_harvest(folder)
    small = ActivationReader(cache, HOOKS[:1], batch_tokens=256, memory_bytes=4 << 20)
    take(small.batches(0), 3)  # what is loaded at first use
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = high_water()
    found = ActivationReader(cache, HOOKS[:1], batch_tokens=1024, memory_bytes=memory)
    for _ in itertools.islice(found.batches(0), found.steps_per_epoch):
        pass
    sys.stdout.write(str(high_water() - before))


def test_a_process_does_not_grow_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the files are about to be emptied
    memory, rows, d_in = 16 << 20, 4096, 1024
    cache = sparse_cache(tmp_path / "cache", 24, rows, d_in)
    assert cache.tokens * d_in * 2 == 192 << 20
    code = (
        "import sys; from pathlib import Path; from tests.training.test_reader import growth_while_reading; "
        "growth_while_reading(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(cache.folder), str(memory)]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, timeout=300, stdout=subprocess.PIPE).stdout)
    one_shard, handed_out, freed = rows * d_in * 2, 2 * 1024 * d_in * 4, 16 << 20  # malloc keeps some of what is freed
    assert grown < memory + one_shard + handed_out + freed


# ---- threads and errors ----------------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("sailguard")]


def test_a_reader_that_is_left_leaves_no_thread(cache: Harvest) -> None:
    found = reader(cache)
    batches = found.batches(0)
    next(batches)
    assert len(threads()) == 1
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    assert threads() == []
    for _ in found.batches(3):
        break
    assert threads() == []
    found.batches(0)  # never started
    assert next(reader(cache, prefetch=False).batches(0))
    assert threads() == []


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("memory", [MEMORY, 10**9])
def test_a_damaged_block_is_refused_by_file_and_field_when_it_is_read(
    cache: Harvest, tmp_path: Path, prefetch: bool, memory: int
) -> None:
    for path in cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / cache.shards[4].name
    data = bytearray(target.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    place = json.loads(data[8:header])[HOOKS[1]]["data_offsets"][0]
    data[header + place + 8 * 16 + 1] ^= 0x40  # in the second block
    target.write_bytes(data)
    found = reader(open_harvest(tmp_path), prefetch=prefetch, memory_bytes=memory)
    with pytest.raises(DataError, match=rf"{target.name}, field '{HOOKS[1]}', rows 8 to 15.*checksum"):
        take(found.batches(0), found.steps_per_epoch)
    assert threads() == []
    undamaged = reader(open_harvest(tmp_path), HOOKS[:1], prefetch=prefetch, memory_bytes=memory)
    take(undamaged.batches(0), undamaged.steps_per_epoch)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"hook_names": ("blocks.9.hook_mlp_out",)}, r"'hook_names': 'blocks\.9\.hook_mlp_out' was not harvested"),
        ({"hook_names": ()}, "no hook point"),
        ({"batch_tokens": 10**6}, r"are fewer than one batch of 1000000; give more text"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_read_is_refused(cache: Harvest, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        reader(cache, **options)

"""A harvest on a cluster ends with the bytes of a harvest here, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from feature_bank.errors import DataError
from tests.training.cluster.conftest import TwoNodes
from tests.training.cluster.drivers import stop_driver
from tests.training.cluster.samples import RAY, LlamaForCausalLM, toy
from tests.training.samples import TOY_HOOKS, contents, toy_sequences
from training.cache import MANIFEST
from training.cluster.harvesting import make_on_cluster, pack, unpack

pytestmark = RAY


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a harvest in one process."""
    folder = tmp_path_factory.mktemp("whole")
    toy(folder)
    return contents(folder)


def test_a_shards_sequences_survive_the_way_to_a_worker() -> None:
    pytest.importorskip("pyarrow", reason="comes with ray, which is not installed")
    sequences = toy_sequences(7)
    number, found = unpack(pack(3, sequences))
    assert number == 3
    assert [(s.document, s.ids) for s in found] == [(s.document, s.ids) for s in sequences]
    assert [s.positions.tolist() for s in found] == [s.positions.tolist() for s in sequences]


def test_the_files_are_those_of_a_harvest_in_one_process_and_what_is_there_is_kept(
    cluster: TwoNodes, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kept = "shard-00002.safetensors"
    for name in (MANIFEST, kept):
        (tmp_path / name).write_bytes(whole[name])
    before = (tmp_path / kept).stat().st_mtime_ns
    said: list[tuple[int, int, int]] = []
    cache = toy(tmp_path, make=make_on_cluster, on_shard=lambda *progress: said.append(progress))
    assert contents(tmp_path) == whole
    assert (tmp_path / kept).stat().st_mtime_ns == before
    total = len(cache.shards)
    assert [done for done, _, _ in said] == list(range(1, total + 1))
    assert said[-1] == (total, total, cache.manifest["tokens"])


def test_a_node_that_is_killed_costs_its_running_shards_only(
    cluster: TwoNodes, whole: dict[str, bytes], tmp_path: Path
) -> None:
    finished: dict[str, int] = {}

    def kill(done: int, total: int, _tokens: int) -> None:
        if done == 4:
            finished.update({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")})
            cluster.kill_second()

    toy(tmp_path, model=LlamaForCausalLM(), make=make_on_cluster, on_shard=kill)
    assert contents(tmp_path) == whole
    assert {path.name for path in tmp_path.iterdir()} == set(whole)  # nothing half-written is left
    assert len(finished) >= 4
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_stopped_is_taken_up_where_it_was(
    cluster: TwoNodes, whole: dict[str, bytes], tmp_path: Path, end: signal.Signals
) -> None:
    stop_driver(__name__, tmp_path, cluster.address, once=lambda: len(list(tmp_path.glob("shard-*"))) >= 3, end=end)
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert 3 <= len(finished) < len(whole) - 3
    toy(tmp_path, **({"make": make_on_cluster} if end == signal.SIGKILL else {}))  # it may as well go on here
    assert contents(tmp_path) == whole
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished


def test_what_no_other_worker_would_avoid_is_said_at_once(cluster: TwoNodes, tmp_path: Path) -> None:
    model: Any = LlamaForCausalLM()
    model.embed[:] = float("nan")
    with pytest.raises(DataError, match=rf"NaN or infinity at {TOY_HOOKS[0]} \(document \d+\)"):
        toy(tmp_path, model=model, make=make_on_cluster)
    with pytest.raises(DataError, match="field 'weights'"):
        toy(tmp_path, make=make_on_cluster)


def main(folder: Path, address: str) -> None:
    """Harvest slowly until something ends this."""
    import torch

    from feature_bank.ray_cluster import connect

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with connect(address):
            toy(folder, model=LlamaForCausalLM(), make=make_on_cluster)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""The missing shards of a harvest, made by a pool of Ray actors that hold the model.

An item is a shard. An actor writes it to the shared folder itself and hands back no more than its number, so what
passes the driver does not grow with the activations. Ray gives the shards of a machine that is lost to other actors;
one that was already written is found and left as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_bank.errors import SailguardError
from feature_bank.ray_cluster import import_ray
from training.cache import MANIFEST, shard_path
from training.cluster.pool import work_off_tables
from training.cluster.room import Room, check_version, own_version, room
from training.cluster.shared import await_file, check_shared
from training.corpus import TokenSequence
from training.harvest import Harvest, Missing, ShardMaker, harvest

logger = logging.getLogger(__name__)


class ShardActor:
    """Holds the model, and makes one shard a call. Runs on a worker."""

    def __init__(self, model: Any, maker: ShardMaker, device_type: str, threads: int, expected_version: str) -> None:
        import ray

        torch.set_num_threads(threads)
        self._maker = maker
        self._version = expected_version
        self._model = ray.get(model[0]).to(device_type)

    def __call__(self, item: Any) -> Any:
        """item: a table of one row. Gives the number, and what went wrong: an error that no other actor would avoid."""
        import pyarrow

        number, members = unpack(item)
        try:
            self._make(number, members)
        except SailguardError as e:
            return pyarrow.table({"number": [number], "error": [str(e)]})
        return pyarrow.table({"number": [number], "error": [""]})

    def _make(self, number: int, members: list[TokenSequence]) -> None:
        check_version(self._version)
        check_shared(self._maker.folder / MANIFEST)
        if self._maker.has(number, sum(len(s.positions) for s in members)):
            return  # a machine was lost after it had written the shard
        self._maker.write(number, self._maker.capture(self._model, members))


def harvest_on_cluster(
    model: Any, sequences: Sequence[TokenSequence], hook_names: Sequence[str], folder: Path, **options: Any
) -> Harvest:
    """`training.harvest.harvest` on the connected cluster: the same arguments and files.

    folder: on storage that every machine of the cluster sees under the same path.
    """
    return harvest(model, sequences, hook_names, folder.resolve(), make=make_on_cluster, **options)


def make_on_cluster(
    model: Any, maker: ShardMaker, missing: Missing, *, max_workers: int | None = None
) -> Generator[int]:
    """Make shards on the connected cluster: the `make` of `training.harvest.harvest`.

    The model is put into the cluster's object store once, as it is here, and every actor takes it from there. There are
    as many actors as the cluster has room for, or `max_workers` if that is fewer.

    Raises DataError for what `harvest` raises it for, a folder that the machines do not share, other versions on a
    worker, or a cluster that is lost.
    """
    ray = import_ray("data")
    device = next(model.parameters()).device
    places = room(device.type, torch.get_num_threads())
    _say_threads(places, device)
    held = ray.put(copy.deepcopy(model).cpu() if device.type != "cpu" else model)
    tables = [pack(number, members) for number, members in missing]
    workers = min(places.workers, len(tables), max_workers or places.workers)
    found = work_off_tables(
        ShardActor,
        ([held], maker, device.type, places.cpus, own_version()),
        tables,
        places,
        workers=workers,
        kept="finished shards are kept",
    )
    del tables
    for row in found:
        await_file(shard_path(maker.folder, row["number"]))
        yield row["number"]


def pack(number: int, sequences: Sequence[TokenSequence]) -> Any:
    """A shard's sequences as a table of one row, without an object a token."""
    import pyarrow

    columns = {
        "ids": np.concatenate([np.asarray(s.ids, dtype=np.int32) for s in sequences]),
        "positions": np.concatenate([s.positions.astype(np.int32) for s in sequences]),
        "lengths": np.array([len(s.ids) for s in sequences], dtype=np.int32),
        "kept": np.array([len(s.positions) for s in sequences], dtype=np.int32),
        "documents": np.array([s.document for s in sequences], dtype=np.int64),
    }
    return pyarrow.table({"number": [number], **{name: pyarrow.array([values]) for name, values in columns.items()}})


def unpack(table: Any) -> tuple[int, list[TokenSequence]]:
    """What was packed."""
    row = {name: table[name][0].values.to_numpy() for name in ("ids", "positions", "lengths", "kept", "documents")}
    ids = np.split(row["ids"], np.cumsum(row["lengths"])[:-1])
    positions = np.split(row["positions"].astype(np.int64), np.cumsum(row["kept"])[:-1])
    return table["number"][0].as_py(), [
        TokenSequence(document=document, ids=own.tolist(), positions=places)
        for document, own, places in zip(row["documents"].tolist(), ids, positions, strict=True)
    ]


def _say_threads(places: Room, device: torch.device) -> None:
    if device.type == "cpu" and places.cpus != torch.get_num_threads():
        logger.warning(
            "a worker computes with %d threads, this process with %d: activations may differ in the last bit",
            places.cpus,
            torch.get_num_threads(),
        )

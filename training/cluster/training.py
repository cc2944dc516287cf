"""Training SAEs on a cluster, with the loop that is used here: many by a worker each, few by several workers each.

Where there are no fewer runs than workers, each worker trains its share of them alone, and nothing passes between
workers: a run depends on its settings and the data alone, so that it ends the same wherever it is trained. Where there
are fewer, a run is trained by a team, each member on its part of every batch; they add up their gradients at each step.

Checkpoints lie in the output folder on shared storage. When a machine is lost, Ray Train starts the workers again, as
many as there is room for; they are divided anew among the runs that are left, which go on from their checkpoints.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from feature_bank.errors import DataError, SailguardError
from feature_bank.ray_cluster import import_ray
from training.architectures import StepStats
from training.batches import Reader
from training.cluster.room import check_version, own_version, room
from training.cluster.shared import VISIBLE_SECONDS, await_file, check_shared
from training.devices import choose_device
from training.interruption import LOCK_FILE, sole_user
from training.runs import SaeRun
from training.trainer import OnStep, TrainedSae, finished_saes, sae_file, train_claimed

MAX_FAILURES = 8
"""Times that the workers are started again after one was lost."""
ROWS_EACH = 1024
"""Rows of a batch that each member of a team has at least. An estimate: through a network of 10 Gbit/s the gradients of
a step take about as long as 16 cores compute on so many rows."""
REPORT_SECONDS = 0.5
STATE_FOLDER = ".ray"
logger = logging.getLogger(__name__)


def train_saes_on_cluster(
    reader: Reader,
    runs: Sequence[SaeRun],
    folder: Path,
    *,
    on_step: OnStep | None = None,
    model_name: str = "",
    max_failures: int = MAX_FAILURES,
    rows_each: int = ROWS_EACH,
) -> list[TrainedSae]:
    """`training.trainer.train_saes` on the connected cluster: the same arguments and files.

    The weights are the same to the bit where a run has one worker, and but for rounding where it has several.

    reader: is copied to every worker, so its cache must lie, as `folder` must, on storage that all machines share.
    on_step: is told of the latest step of a run from time to time, not of every one. max_failures: how often lost
    workers are replaced. rows_each: rows of a batch that a run has for each of its workers, if it has several.

    Ctrl-C stops the workers with the end of `feature_bank.ray_cluster.connect`; what they made since their last
    checkpoints is made again by the next call.

    Raises DataError for what `train_saes` raises it for, once the runs that can be trained are finished, for a folder
    that is not shared, and for a cluster that lost more workers than `max_failures`.
    """
    folder = folder.resolve()
    with sole_user(folder):
        found = finished_saes(reader, runs, folder)
        missing = [run for run, sae in zip(runs, found, strict=True) if sae is None]
        if missing:
            _fit(reader, missing, folder, on_step, model_name, max_failures, rows_each)
            deadline = time.monotonic() + VISIBLE_SECONDS
            for run in missing:
                await_file(sae_file(run, folder), max(0.0, deadline - time.monotonic()))
            found = finished_saes(reader, runs, folder)
    return [sae for sae in found if sae is not None]


def shares(runs: Sequence[SaeRun], costs: Mapping[str, float], workers: int) -> list[list[SaeRun]]:
    """The runs of every worker: the costliest first, each to the worker that has least to do."""
    found: list[list[SaeRun]] = [[] for _ in range(workers)]
    load = [0.0] * workers
    for run in sorted(runs, key=lambda run: -costs[run.name]):  # stable, so every worker finds the same
        least = load.index(min(load))
        found[least].append(run)
        load[least] += costs[run.name]
    return found


class Team(NamedTuple):
    """Workers that train the same runs together."""

    ranks: tuple[int, ...]
    runs: list[SaeRun]


def teams(runs: Sequence[SaeRun], costs: Mapping[str, float], workers: int, rows_each: int) -> list[Team]:
    """Which workers train which runs: each worker some of them alone or, where runs are fewer, several workers a run.

    The workers that are left over go one by one to the run that is the costliest for each of its workers, as long as
    each of these has `rows_each` rows of a batch. Workers of no team have nothing to do.
    """
    if workers <= len(runs):
        return [Team((rank,), share) for rank, share in enumerate(shares(runs, costs, workers))]
    sizes = {run.name: 1 for run in runs}
    for _ in range(workers - len(runs)):
        open_runs = [run for run in runs if sizes[run.name] < most_workers(run, rows_each)]
        if open_runs:
            sizes[max(open_runs, key=lambda run: costs[run.name] / sizes[run.name]).name] += 1
    found, first = [], 0
    for run in runs:
        found.append(Team(tuple(range(first, first + sizes[run.name])), [run]))
        first += sizes[run.name]
    return found


def most_workers(run: SaeRun, rows_each: int) -> int:
    """How many workers may train one run together."""
    return max(1, run.config.batch_tokens // rows_each)


def _fit(
    reader: Reader,
    runs: Sequence[SaeRun],
    folder: Path,
    on_step: OnStep | None,
    model_name: str,
    max_failures: int,
    rows_each: int,
) -> None:
    """Train `runs` on the workers, and pass on what they report."""
    ray = import_ray("train")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    device = choose_device(runs[0].config.device)
    places = room(device.type, torch.get_num_threads())
    widths = {name: rows.shape[1] for name, rows in reader.sample(1).items()}
    most = sum(most_workers(run, rows_each) for run in runs)
    workers: Any = (1, min(places.workers, most))  # when a machine is lost, fewer go on
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    trainer = TorchTrainer(
        train_share,
        train_loop_config={
            "reader": [ray.put(reader)],
            "runs": list(runs),
            "costs": {
                run.name: run.config.epochs * (run.config.d_sae or run.config.expansion * widths[run.hook_name])
                for run in runs
            },
            "folder": folder,
            "model_name": model_name,
            "device": device.type,
            "rows_each": rows_each,
            "threads": places.cpus,
            "queue": queue,
            "version": own_version(),
        },
        torch_config=TorchConfig(backend="gloo"),  # to agree in; a team on accelerators makes an NCCL group of its own
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=places.gpus > 0,
            resources_per_worker={"CPU": places.cpus, **({"GPU": places.gpus} if places.gpus else {})},
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(folder / STATE_FOLDER),
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as e:  # noqa: BLE001  # it is raised again in the thread that waits
            raised.append(e)

    # In a thread, because Ray Train takes Ctrl-C for itself in the main one and would end the process
    thread = threading.Thread(target=fit, name="sailguard-cluster", daemon=True)
    thread.start()
    complaints: list[str] = []
    try:
        alive = True
        while alive:
            thread.join(REPORT_SECONDS)
            alive = thread.is_alive()
            _drain(queue, {run.name: run for run in runs}, on_step, complaints)
    finally:
        shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
        queue.shutdown(force=True)
    if complaints:
        raise DataError(complaints[0])
    if raised:
        reason = " ".join(str(raised[0]).split())[-400:]
        raise DataError(
            f"the cluster could not go on ({reason}); finished SAEs and checkpoints are kept: run the same command "
            "again"
        ) from raised[0]


def _drain(queue: Any, runs: Mapping[str, SaeRun], on_step: OnStep | None, complaints: list[str]) -> None:
    """Pass on what the workers have reported."""
    waiting = queue.qsize()
    for kind, content in queue.get_nowait_batch(waiting) if waiting else ():
        if kind == "error":
            if content not in complaints:  # every member of a team says it
                complaints.append(content)
                logger.warning("%s; the other SAEs are trained to their end", content)
        elif kind == "team":
            logger.info("%s", content)
        elif on_step is not None:
            for name, (step, steps, stats) in content.items():
                on_step(runs[name], step, steps, StepStats(*stats))


def train_share(config: dict[str, Any]) -> None:
    """Train this worker's share. Runs on a worker."""
    import ray
    import ray.train

    from training.cluster.replicas import form_groups, whole_world  # it imports torch's compiler

    context = ray.train.get_context()
    rank, folder = context.get_world_rank(), config["folder"]
    # One of them looks, since a network file system may not show the same to all
    left = whole_world().lead(lambda: [run.name for run in config["runs"] if not sae_file(run, folder).exists()])
    runs = [run for run in config["runs"] if run.name in left]
    found = teams(runs, config["costs"], context.get_world_size(), config["rows_each"])
    batch = config["runs"][0].config.batch_tokens
    replicas = form_groups([team.ranks for team in found], torch.device(config["device"]), batch)
    mine = [run for team in found if rank in team.ranks for run in team.runs]
    queue = config["queue"]
    latest: dict[str, tuple[int, int, tuple[float, ...]]] = {}
    said = time.monotonic()

    def report(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        nonlocal said
        latest[run.name] = (step, steps, tuple(stats))
        if time.monotonic() - said >= REPORT_SECONDS:
            queue.put(("steps", dict(latest)))
            latest.clear()
            said = time.monotonic()

    def check() -> None:
        check_version(config["version"])
        check_shared(folder / LOCK_FILE)
        for path in ray.get(config["reader"][0]).files:
            check_shared(path)

    try:
        replicas.each(check)
        torch.set_num_threads(config["threads"])
        if mine:
            reader = ray.get(config["reader"][0])
            if replicas.size > 1 and replicas.rank == 0:
                each = f"{batch // replicas.size} or more of the {batch} rows of a batch"
                queue.put(("team", f"{mine[0].name} is trained by {replicas.size} workers, each on {each}"))
            on_step = report if replicas.rank == 0 else None
            train_claimed(reader, mine, folder, on_step=on_step, model_name=config["model_name"], replicas=replicas)
    except SailguardError as e:  # to start it again would meet it again
        queue.put(("error", str(e)))
    if latest:
        queue.put(("steps", latest))

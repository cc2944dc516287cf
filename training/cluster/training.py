"""Training many SAEs on a cluster: each worker trains its share of them, alone, with the loop that is used here.

Nothing passes between the workers: a run depends on its settings and the data alone, so that it ends the same wherever
it is trained. Checkpoints lie in the output folder on shared storage. When a machine is lost, Ray Train starts the
workers again, as many as there is room for, and each goes on from the checkpoints of the runs that are now its own.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from feature_bank.errors import DataError, SailguardError
from training.architectures import StepStats
from training.batches import Reader
from training.cluster.connection import import_ray, own_version, room
from training.cluster.shared import VISIBLE_SECONDS, await_file, check_shared
from training.devices import choose_device
from training.interruption import LOCK_FILE, sole_user
from training.runs import SaeRun
from training.trainer import OnStep, TrainedSae, finished_saes, sae_file, train_claimed

MAX_FAILURES = 8
"""Times that the workers are started again after one was lost."""
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
) -> list[TrainedSae]:
    """`training.trainer.train_saes` on the connected cluster: the same arguments, files and weights.

    reader: is copied to every worker, so its cache must lie, as `folder` must, on storage that all machines share.
    on_step: is told of the latest step of a run from time to time, not of every one. max_failures: how often lost
    workers are replaced.

    Ctrl-C stops the workers at once; what they made since their last checkpoints is made again by the next call.

    Raises DataError for what `train_saes` raises it for, once the runs that can be trained are finished, for a folder
    that is not shared, and for a cluster that lost more workers than `max_failures`.
    """
    folder = folder.resolve()
    with sole_user(folder):
        found = finished_saes(reader, runs, folder)
        missing = [run for run, sae in zip(runs, found, strict=True) if sae is None]
        if missing:
            _fit(reader, missing, folder, on_step, model_name, max_failures)
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


def _fit(
    reader: Reader,
    runs: Sequence[SaeRun],
    folder: Path,
    on_step: OnStep | None,
    model_name: str,
    max_failures: int,
) -> None:
    """Train `runs` on the workers, and pass on what they report."""
    ray = import_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    device = choose_device(runs[0].config.device)
    places = room(device.type, torch.get_num_threads())
    widths = {name: rows.shape[1] for name, rows in reader.sample(1).items()}
    workers: Any = (1, min(places.workers, len(runs)))  # when a machine is lost, fewer go on
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
            "threads": places.cpus,
            "queue": queue,
            "version": own_version(),
        },
        torch_config=TorchConfig(backend="gloo"),  # no tensor passes between workers, so NCCL has nothing to set up
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
            complaints.append(content)
            logger.warning("%s; the other SAEs are trained to their end", content)
        elif on_step is not None:
            for name, (step, steps, stats) in content.items():
                on_step(runs[name], step, steps, StepStats(*stats))


def train_share(config: dict[str, Any]) -> None:
    """Train this worker's share. Runs on a worker."""
    import ray
    import ray.train

    context = ray.train.get_context()
    mine = shares(config["runs"], config["costs"], context.get_world_size())[context.get_world_rank()]
    queue = config["queue"]
    latest: dict[str, tuple[int, int, tuple[float, ...]]] = {}
    said = time.monotonic()

    def on_step(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        nonlocal said
        latest[run.name] = (step, steps, tuple(stats))
        if time.monotonic() - said >= REPORT_SECONDS:
            queue.put(("steps", dict(latest)))
            latest.clear()
            said = time.monotonic()

    try:
        if (found := own_version()) != config["version"]:
            raise DataError(f"a machine of the cluster has sailguard {found}, not {config['version']}; install one")
        check_shared(config["folder"] / LOCK_FILE)
        torch.set_num_threads(config["threads"])
        if mine:
            reader = ray.get(config["reader"][0])
            train_claimed(reader, mine, config["folder"], on_step=on_step, model_name=config["model_name"])
    except SailguardError as e:  # to start it again would meet it again
        queue.put(("error", str(e)))
    if latest:
        queue.put(("steps", latest))

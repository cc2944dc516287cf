"""The training loop: many SAEs from one pass over cached activations, each with exact resume.

Every SAE is a run of its own, with its own weights, optimiser, schedule, checkpoints and folder; what the runs share is
the reading. A run depends on nothing but its settings and the data, so that it ends the same alone or beside others,
and whatever interrupted it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.formats.saelens import CONFIG_FILE, load_saelens, save_saelens
from feature_bank.sae import SAE
from training.architectures import StepStats
from training.batches import Batch, Reader, TensorReader, checked, inliers, read_ahead
from training.checkpoints import (
    first_difference,
    read_checkpoint,
    remove_checkpoints,
    remove_leftovers,
    write_checkpoint,
)
from training.fingerprints import take_fingerprints
from training.interruption import held_back, sole_user
from training.replicas import ALONE, Replicas
from training.run_state import RunState, resolve_options
from training.runs import SaeRun, TrainerConfig, label, learning_rate

__all__ = [
    "OnStep",
    "SaeRun",
    "TrainedSae",
    "TrainerConfig",
    "finished_saes",
    "inliers",
    "label",
    "learning_rate",
    "train_claimed",
    "train_sae",
    "train_saes",
]

OnStep = Callable[[SaeRun, int, int, StepStats], None]
"""on_step(run, step, steps, stats), with the number of steps made."""

SAE_FOLDER = "saes"
CHECKPOINT_FOLDER = "checkpoints"
PREFETCH = 2


@dataclass(frozen=True)
class TrainedSae:
    """A finished run: a SAELens folder, and the figures that its `cfg.json` records."""

    run: SaeRun
    folder: Path
    figures: Mapping[str, float]
    """fvu, l0, dead_fraction: means of the last steps; steps, tokens, seconds, tokens_per_second."""

    def load(self) -> SAE:
        """Read the SAE. Raises BankError naming the file and field that are damaged."""
        return load_saelens(self.folder)


def train_saes(
    reader: Reader,
    runs: Sequence[SaeRun],
    folder: Path,
    *,
    on_step: OnStep | None = None,
    model_name: str = "",
) -> list[TrainedSae]:
    """Train all `runs` in one pass over the reader (as many as the longest has epochs), and return them in order.

    SAEs are kept in `folder/saes/RUN`, checkpoints in `folder/checkpoints/RUN` until the run is finished. Called again
    after an interruption of any kind, finished runs are read back and the others go on from their checkpoints, ending
    with the same bits on a CPU as if nothing had happened. Ctrl-C and SIGTERM first write checkpoints.

    Raises DataError naming the run and field for settings that do not fit the data or the architecture, activations or
    gradients that are not finite, a finished SAE or checkpoint of another configuration, or a folder that is in use;
    naming the file if one is damaged or cannot be written. What was finished before stays.
    """
    _check(reader, runs)
    with sole_user(folder):
        return train_claimed(reader, runs, folder, on_step=on_step, model_name=model_name)


def train_claimed(
    reader: Reader,
    runs: Sequence[SaeRun],
    folder: Path,
    *,
    on_step: OnStep | None = None,
    model_name: str = "",
    replicas: Replicas = ALONE,
) -> list[TrainedSae]:
    """`train_saes` in a folder whose lock the caller holds, or holds for this process: some of the runs of a whole.

    replicas: who trains each of these runs together; all of them make this call, and the first one reads and writes
    the files. What one of them cannot go on with is raised in all.
    """
    generators = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=generators):
        sample, fingerprints = replicas.each(lambda: take_fingerprints(reader, runs))
        figures = replicas.lead(
            lambda: {
                run.name: found.figures
                for run in runs
                if (found := _finished(run, folder, fingerprints[run.name])) is not None
            }
        )
        trained = {
            run.name: TrainedSae(run, sae_file(run, folder).parent, figures[run.name])
            for run in runs
            if run.name in figures
        }
        states = []
        for run in runs:
            if run.name not in trained:
                state = RunState(run, sample, steps=reader.steps_per_epoch * run.config.epochs, replicas=replicas)
                _restore(state, folder, fingerprints[run.name])
                states.append(state)
        del sample
        for finished in _train(reader, states, folder, fingerprints, on_step, model_name):
            trained[finished.run.name] = finished
    return [trained[run.name] for run in runs if run.name in trained]


def finished_saes(reader: Reader, runs: Sequence[SaeRun], folder: Path) -> list[TrainedSae | None]:
    """The SAEs that are finished in `folder`, and None for each that is not.

    Raises DataError, as `train_saes` does, for settings that do not fit and for a finished SAE of other ones.
    """
    _check(reader, runs)
    _, fingerprints = take_fingerprints(reader, runs)
    return [_finished(run, folder, fingerprints[run.name]) for run in runs]


def train_sae(
    activations: Float[Tensor, "tokens d_in"],
    hook_name: str,
    folder: Path,
    config: TrainerConfig,
    *,
    on_step: Callable[[int, int, StepStats], None] | None = None,
) -> tuple[SAE, StepStats]:
    """Train one SAE on activations in memory: any floating dtype, one row a token. See `train_saes`."""
    reader = TensorReader({hook_name: activations}, batch_tokens=config.batch_tokens, seed=config.seed)
    report: OnStep | None = None
    if on_step is not None:

        def report(_run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
            on_step(step, steps, stats)

    (trained,) = train_saes(reader, [SaeRun(hook_name, config, name=hook_name)], folder, on_step=report)
    return trained.load(), StepStats(**{name: trained.figures[name] for name in StepStats._fields})


def sae_file(run: SaeRun, folder: Path) -> Path:
    """The file of a run that appears when it is finished."""
    return folder / SAE_FOLDER / run.name / CONFIG_FILE


def _check(reader: Reader, runs: Sequence[SaeRun]) -> None:
    """Refuse what cannot be trained before anything is written."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise DataError(f"two SAEs have the name {run.name!r}; give each another 'name'")
        for hook_name in filter(None, (run.hook_name, run.hook_name_out)):
            if hook_name not in reader.hook_names:
                raise DataError(f"{run.name}: {hook_name!r} is not in the cache; it has {', '.join(reader.hook_names)}")
        if run.config.batch_tokens != reader.batch_tokens:
            raise DataError(
                f"{run.name}, field 'batch_tokens': {run.config.batch_tokens} is not the reader's {reader.batch_tokens}"
            )
        resolve_options(run)
    if reader.steps_per_epoch < 1:
        raise DataError(
            f"{reader.tokens} activations at {', '.join(reader.hook_names)} are fewer than one batch of "
            f"{reader.batch_tokens}; give more text"
        )


def _finished(run: SaeRun, folder: Path, fingerprint: Mapping[str, Any]) -> TrainedSae | None:
    """The SAE of a run that was finished earlier."""
    file = sae_file(run, folder)
    target = file.parent
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))["metadata"]["training"]
        theirs, figures = record["fingerprint"], record["figures"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{file}, field 'metadata.training': damaged ({e!r}); remove {target} to train it anew") from e
    differing = first_difference(theirs, json.loads(json.dumps(fingerprint)))
    if differing is not None:
        raise DataError(
            f"{file}, field {'metadata.training.fingerprint.' + differing[0]!r}: a finished SAE of another "
            f"configuration: it has {differing[1]!r}, this run {differing[2]!r}; remove {target} or use another folder"
        )
    remove_checkpoints(folder / CHECKPOINT_FOLDER / run.name)  # a kill may have come just before
    return TrainedSae(run, target, figures)


def _restore(state: RunState, folder: Path, fingerprint: Mapping[str, Any]) -> None:
    checkpoints = folder / CHECKPOINT_FOLDER / state.run.name

    def restore() -> None:
        remove_leftovers(checkpoints)
        checkpoint = read_checkpoint(checkpoints, fingerprint=fingerprint)
        if checkpoint is not None:
            state.restore(checkpoint, str(checkpoints))

    state.replicas.lead(restore)
    state.align()


def _train(
    reader: Reader,
    states: list[RunState],
    folder: Path,
    fingerprints: Mapping[str, Mapping[str, Any]],
    on_step: OnStep | None,
    model_name: str,
) -> list[TrainedSae]:
    """Make the steps that are left; a run is written, and its memory freed, when it is finished."""
    kept = {state.run.name: (state.step, time.monotonic()) for state in states}

    def settle(state: RunState) -> None:
        found = state.settle()
        for step, stats in enumerate(found, state.step - len(found) + 1):
            if on_step is not None:
                on_step(state.run, step, state.steps, stats)

    def keep(state: RunState) -> None:
        settle(state)
        state.align()
        path, fingerprint = folder / CHECKPOINT_FOLDER / state.run.name, fingerprints[state.run.name]
        replicas.lead(lambda: write_checkpoint(path, state.checkpoint(), fingerprint=fingerprint))
        kept[state.run.name] = (state.step, time.monotonic())

    def is_due(state: RunState) -> bool:
        config = state.run.config
        elapsed = time.monotonic() - kept[state.run.name][1]
        if state.step % config.checkpoint_every:
            return False
        return replicas.lead(lambda: elapsed >= config.checkpoint_seconds)

    finished: list[TrainedSae] = []
    if not states:
        return finished
    replicas = states[0].replicas
    step = min(state.step for state in states)
    batches = replicas.parts(checked(reader.batches(step), step))
    depth = max(PREFETCH if (d := state.run.config.prefetch) is None else d for state in states)
    pin = any(state.device.type == "cuda" for state in states)
    with held_back() as stopping, read_ahead(batches, depth, pin=pin) as ahead:
        while states and not stopping():
            placed: dict[torch.device, Batch] = {torch.device("cpu"): replicas.each(lambda: next(ahead))}
            for state in [s for s in states if s.step == step]:  # a run whose checkpoint is newer waits for the others
                if state.advance(_place(placed, state.device)):
                    settle(state)
                if state.step == state.steps:
                    finished.append(_finish(state, folder, fingerprints[state.run.name], model_name))
                    states.remove(state)
                elif is_due(state):
                    keep(state)
            step += 1
        for state in states:
            if state.step > kept[state.run.name][0]:
                keep(state)
    if states:  # the signal's handler, which has been called now, did not end the program
        raise KeyboardInterrupt
    return finished


def _place(placed: dict[torch.device, Batch], device: torch.device) -> Batch:
    """The batch on `device`, moved there once for all runs."""
    if device not in placed:
        batch = placed[torch.device("cpu")]
        placed[device] = {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}
    return placed[device]


def _finish(state: RunState, folder: Path, fingerprint: Mapping[str, Any], model_name: str) -> TrainedSae:
    """Write the SAE and then drop its checkpoints."""
    run = state.run
    target = folder / SAE_FOLDER / run.name

    def write() -> dict[str, float]:
        figures = state.figures
        try:
            save_saelens(
                state.export(),
                target,
                model_name=model_name,
                metadata={"training": {"fingerprint": fingerprint, "figures": figures}},
            )
        except BankError as e:
            raise DataError(
                f"{target}: the trained SAE cannot be written ({e.message}); its last checkpoint is whole: make room "
                "and run the same command again"
            ) from e
        remove_checkpoints(folder / CHECKPOINT_FOLDER / run.name)
        return figures

    return TrainedSae(run, target, state.replicas.lead(write))

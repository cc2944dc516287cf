"""Checkpoints of one training run: written whole or not at all, the last good ones kept, read back exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_bank.atomic import atomic_folder
from feature_bank.errors import DataError

STATE_FILE = "state.json"
TENSORS_FILE = "tensors.safetensors"
KEPT = 2
"""How many checkpoints of a run stay: should the newest be damaged, the run goes on from the one before it."""
_PREFIX = "step-"
_FIELDS: dict[str, type] = {"fingerprint": dict, "step": int, "sha256": str, "state": dict}

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A run after `step` steps: its tensors by name, and what else the next step depends on."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, fingerprint: Mapping[str, Any], keep: int = KEPT) -> None:
    """Write `folder/step-N`, and remove all but the newest `keep` checkpoints.

    fingerprint: what the run is; only a run with the same one may read the checkpoint.

    Raises DataError if it cannot be written (a full disk, say); the checkpoints before it stay as they are.
    """
    target = folder / f"{_PREFIX}{checkpoint.step:09d}"
    try:
        with atomic_folder(target) as tmp:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            save_file(tensors, tmp / TENSORS_FILE)
            record = {
                "fingerprint": fingerprint,
                "step": checkpoint.step,
                "sha256": _sha256(tmp / TENSORS_FILE),
                "state": checkpoint.state,
            }
            (tmp / STATE_FILE).write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    except (OSError, SafetensorError) as e:
        raise DataError(
            f"{target}: the checkpoint of step {checkpoint.step} cannot be written ({e}); what was finished and the "
            "checkpoints before it are whole: make room and run the same command again"
        ) from e
    for old in _checkpoints(folder)[keep:]:
        _remove(old)


def read_checkpoint(folder: Path, *, fingerprint: Mapping[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`, or None if there is none. A damaged one is passed over and logged.

    Raises DataError if all are damaged, or the newest whole one is another run's; the message names file and field.
    """
    damage: list[DataError] = []
    for path in _checkpoints(folder):
        try:
            record = _read_record(path)
            differing = first_difference(record["fingerprint"], json.loads(json.dumps(fingerprint)))
            if differing is None:
                return Checkpoint(record["step"], _read_tensors(path, record["sha256"]), record["state"])
        except DataError as e:
            logger.warning("%s; going on with the checkpoint before it, if there is one", e)
            damage.append(e)
            continue
        field, theirs, ours = differing
        raise DataError(
            f"{path / STATE_FILE}, field {field!r}: the checkpoint belongs to another configuration: it has "
            f"{theirs!r}, this run {ours!r}; remove {folder} or use another folder"
        )
    if damage:
        raise DataError(f"{damage[0]}; remove {folder} to train this one from the beginning") from damage[0]
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, and what a killed process left half-written."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed left half-written or half-removed. No other process may be at work."""
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def first_difference(theirs: Any, ours: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """(field, value in `theirs`, value in `ours`) where two JSON values first differ, or None if they are equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            found = first_difference(theirs.get(key), ours.get(key), f"{field}.{key}" if field else key)
            if found is not None:
                return found
        return None
    return None if theirs == ours else (field, theirs, ours)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob(f"{_PREFIX}*"), reverse=True)


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")  # a half-removed checkpoint must not look like one
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _read_record(path: Path) -> dict[str, Any]:
    file = path / STATE_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{file}: damaged ({e})") from e
    if not isinstance(record, dict):
        raise DataError(f"{file}: damaged (no JSON object)")
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise DataError(f"{file}, field {field!r}: missing or no {kind.__name__}")
    return record


def _read_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    file = path / TENSORS_FILE
    try:
        if _sha256(file) != sha256:
            raise DataError(f"{file}, field 'sha256': the file is not the one that was written")
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise DataError(f"{file}: damaged ({e})") from e


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What tells one training run from another: its settings and its data, kept with whatever it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from training.batches import Batch, Reader
from training.devices import choose_autocast, choose_device
from training.run_state import resolve_options
from training.runs import SaeRun

SAMPLE_ROWS = 16_384


def take_fingerprints(reader: Reader, runs: Sequence[SaeRun]) -> tuple[Batch, dict[str, dict[str, Any]]]:
    """A sample of the data, and the fingerprint of every run on it."""
    sample = reader.sample(SAMPLE_ROWS)
    identity = _data_identity(reader, sample)
    return sample, {run.name: _fingerprint(run, identity, sample) for run in runs}


def _data_identity(reader: Reader, sample: Batch) -> dict[str, Any]:
    """What tells one cache from another: its size, the order it is read in, and the bytes of a sample."""
    digests = {name: hashlib.sha256(rows.numpy().tobytes()).hexdigest() for name, rows in sample.items()}
    return {"tokens": reader.tokens, "order": dict(reader.order), "sample": digests}


def _fingerprint(run: SaeRun, identity: Mapping[str, Any], sample: Batch) -> dict[str, Any]:
    own = [name for name in (run.hook_name, run.hook_name_out) if name]
    resolved = {
        "options": resolve_options(run)[1].model_dump(mode="json"),
        "autocast": choose_autocast(run.config.autocast, choose_device(run.config.device)),
    }
    return {
        "config": {**run.config.meaning(), **resolved},
        "hook_name": run.hook_name,
        "hook_name_out": run.hook_name_out,
        "d_in": sample[run.hook_name].shape[1],
        "data": {**identity, "sample": {name: identity["sample"][name] for name in own}},
    }

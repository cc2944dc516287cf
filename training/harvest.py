"""Activations of a corpus at several hook points, from one truncated forward pass, into shards on disk.

A shard covers a fixed list of documents and is written atomically; a run that was stopped goes on with the first
missing shard, so an interruption costs at most the shard in work, and the shards do not depend on interruptions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError
from guard.capture import pad_batch, truncated_forward
from training.corpus import TokenSequence

MANIFEST = "harvest.json"
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """A finished cache. Token rows lie in shard order; documents are indices into the corpus."""

    folder: Path
    hook_names: tuple[str, ...]
    shards: tuple[Path, ...]
    documents: np.ndarray[Any, np.dtype[np.int64]]
    """(tokens,) the document of every row; a document's rows are consecutive and in order."""
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    """(tokens,) the token of every row."""

    def activations(self, hook_name: str) -> Float[Tensor, "tokens d_in"]:
        """All activations of one hook point, bfloat16, in memory: 2 * tokens * d_in bytes."""
        parts = []
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                parts.append(tensors.get_tensor(hook_name))
        return torch.cat(parts)


def plan_shards(sequences: Sequence[TokenSequence], *, shard_tokens: int) -> list[list[TokenSequence]]:
    """Sequences by length, cut into shards of about `shard_tokens` tokens. A pure function of its arguments."""
    ordered = sorted(sequences, key=lambda s: (len(s.ids), s.document))
    shards: list[list[TokenSequence]] = [[]]
    filled = 0
    for sequence in ordered:
        if filled >= shard_tokens:
            shards.append([])
            filled = 0
        shards[-1].append(sequence)
        filled += len(sequence.ids)
    return shards


def harvest(
    model: Any,
    sequences: Sequence[TokenSequence],
    hook_names: Sequence[str],
    folder: Path,
    *,
    fingerprint: dict[str, Any],
    shard_tokens: int = 16_384,
    on_shard: Callable[[int, int, int], None] | None = None,
) -> Harvest:
    """Capture `hook_names` on all sequences into `folder`, resuming what is there.

    fingerprint: what the activations depend on besides the sequences (model, tokenizer). on_shard(done, total, tokens).

    Raises DataError if there is no sequence, the folder holds another harvest or a damaged shard, or an activation is
    not finite.
    """
    if not sequences:
        raise DataError("no text gives a token to harvest; give more text")
    plan = plan_shards(sequences, shard_tokens=shard_tokens)
    manifest = {
        **fingerprint,
        "hook_names": list(hook_names),
        "shard_tokens": shard_tokens,
        "sequences": _hash(sequences),
        "shards": len(plan),
    }
    _claim(folder / MANIFEST, manifest)
    paths = [folder / f"shard-{i:05d}.safetensors" for i in range(len(plan))]
    done = 0
    for number, (path, members) in enumerate(zip(paths, plan, strict=True)):
        tokens = sum(len(s.ids) for s in members)
        if not path.exists():
            tensors = _capture(model, members, hook_names)
            with atomic_file(path) as tmp:
                save_file(tensors, tmp)
        done += tokens
        if on_shard is not None:
            on_shard(number + 1, len(plan), done)
    documents, token_ids = [], []
    for path in paths:
        try:
            with safe_open(path, framework="np") as tensors:
                documents.append(tensors.get_tensor("document"))
                token_ids.append(tensors.get_tensor("token"))
        except SafetensorError as e:
            raise DataError(f"{path}: a damaged shard ({e}); remove it and run again") from e
    return Harvest(
        folder=folder,
        hook_names=tuple(hook_names),
        shards=tuple(paths),
        documents=np.concatenate(documents).astype(np.int64),
        token_ids=np.concatenate(token_ids).astype(np.int64),
    )


def _capture(model: Any, members: Sequence[TokenSequence], hook_names: Sequence[str]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    start = 0
    while start < len(members):  # members are sorted by length, so the last of a batch is its longest
        stop = start + 1
        while stop < len(members) and (stop + 1 - start) * len(members[stop].ids) <= BATCH_TOKENS:
            stop += 1
        batch = members[start:stop]
        start = stop
        ids, mask = pad_batch([s.ids for s in batch], 0, device)
        hidden = truncated_forward(model, hook_names, ids, mask)
        rows = torch.cat([torch.full((len(s.positions),), row) for row, s in enumerate(batch)]).to(device)
        columns = torch.from_numpy(np.concatenate([s.positions for s in batch])).to(device)
        for name in hook_names:
            kept = hidden[name][rows, columns]
            if not bool(torch.isfinite(kept).all()):
                raise DataError(f"the model gave NaN or infinity at {name}; check the model's weights and dtype")
            found[name].append(kept.to(torch.bfloat16).cpu())
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    tensors["document"] = torch.cat([torch.full((len(s.positions),), s.document, dtype=torch.int32) for s in members])
    tensors["token"] = torch.cat(
        [torch.tensor(s.ids, dtype=torch.int32)[torch.from_numpy(s.positions)] for s in members]
    )
    return tensors


def _hash(sequences: Sequence[TokenSequence]) -> str:
    digest = hashlib.sha256()
    for s in sequences:
        digest.update(np.asarray([s.document, *s.ids], dtype=np.int64).tobytes())
        digest.update(s.positions.tobytes())
    return digest.hexdigest()


def _claim(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that it is the one already there."""
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise DataError(f"{path}: damaged ({e}); remove the folder and run again") from e
        if not isinstance(found, dict):
            raise DataError(f"{path}: damaged (no JSON object); remove the folder and run again")
        for field, value in manifest.items():
            if found.get(field) != value:
                raise DataError(
                    f"{path}, field {field!r}: the cached activations come from other text, settings or another model; "
                    f"remove {path.parent} or use another work folder"
                )
        return
    with atomic_file(path) as tmp:
        tmp.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

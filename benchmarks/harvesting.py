"""The activations that trainers are compared on, and how fast they are harvested beside the bare model."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.peers import HOOK_NAME
from feature_bank.errors import DataError
from training.corpus import Document, TokenSequence, read_documents, tokenise
from training.harvest import harvest
from training.pipeline import own_corpora

MAX_TOKENS = 256  # of a document
HELD_OUT_SHARE = 10  # one held-out row for so many that are trained on


def sequences_of(
    documents: Sequence[Document], tokenizer: Any, budget: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(sequences to train on, sequences to evaluate on) of about `budget` kept tokens, and a tenth of that.

    Documents come in the order of their ids' hashes; those of the split "test" are the held-out ones.
    """
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).digest())
    parts = []
    for held_out, wanted in ((False, budget), (True, max(1, budget // HELD_OUT_SHARE))):
        found: list[TokenSequence] = []
        some = [d for d in ordered if (d.split == "test") == held_out]
        for start in range(0, len(some), 200):
            if wanted <= 0:
                break
            for sequence in tokenise(some[start : start + 200], tokenizer, max_tokens=MAX_TOKENS):
                if wanted > 0:
                    wanted -= len(sequence.positions)
                    found.append(replace(sequence, document=start + sequence.document))
        parts.append(found)
    return parts[0], parts[1]


def read_text(data: Path | None) -> list[Document]:
    """The text written for the project, and that of a folder's *.jsonl and *.jsonl.gz files.

    Raises DataError for a folder without such files.
    """
    files = own_corpora()
    if data is not None:
        found = sorted([*data.glob("*.jsonl"), *data.glob("*.jsonl.gz")])
        if not found:
            raise DataError(f"{data}: no *.jsonl or *.jsonl.gz in it; give a folder of JSON lines with a field 'text'")
        files = [*files, *found]
    return read_documents(files)[0]


def cached_rows(
    model: Any, sequences: Sequence[TokenSequence], folder: Path, report: Callable[[str], None]
) -> Float[Tensor, "tokens d_in"]:
    """Activations at `HOOK_NAME`, bfloat16, from our harvest into `folder`; attention-sink outliers left out."""
    cache = harvest(
        model,
        sequences,
        (HOOK_NAME,),
        folder,
        fingerprint={"model": "embedded"},
        on_shard=lambda done, total, _: report(f"harvest {folder.name}: shard {done} of {total}"),
    )
    keep = torch.ones(cache.tokens, dtype=torch.bool)
    keep[torch.from_numpy(cache.outliers(HOOK_NAME))] = False
    return cache.activations(HOOK_NAME)[keep]


class HarvestBench:
    """Our harvest, the model cut off at the hook point, and the whole model, over the same batches of tokens."""

    def __init__(self, model: Any, sequences: Sequence[TokenSequence], folder: Path) -> None:
        self.model = model
        self.sequences = sequences
        self.folder = folder
        self.tokens = sum(len(s.ids) for s in sequences)
        self.batches: list[dict[str, Any]] = []

    def arms(self) -> dict[str, Callable[[], float]]:
        """Each gives the seconds of one pass over all tokens."""
        with _recorded(self.model, self.batches):  # also warms up
            self.harvest()
        return {
            "harvest": self.harvest,
            "bare_truncated": self.bare_truncated,
            "full": lambda: self._forward(self.model.model),
            "full_with_head": lambda: self._forward(self.model),
        }

    def harvest(self) -> float:
        """From token sequences to shards on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        started = time.perf_counter()
        harvest(self.model, self.sequences, (HOOK_NAME,), self.folder, fingerprint={"model": "embedded"})
        seconds = time.perf_counter() - started
        shutil.rmtree(self.folder)
        return seconds

    def bare_truncated(self) -> float:
        """A model that has no more layers than are needed; nothing is kept."""
        with truncated(self.model, layers=int(HOOK_NAME.split(".")[1]) + 1) as base:
            return self._forward(base)

    def _forward(self, module: nn.Module) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for batch in self.batches:
                module(**batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def _recorded(model: nn.Module, batches: list[dict[str, Any]]) -> Iterator[None]:
    """Append the arguments of the model's forward passes to `batches`."""

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise RuntimeError("the harvest calls the model with positional arguments, which this does not expect")
        batches.append(kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def truncated(model: Any, *, layers: int) -> Iterator[nn.Module]:
    """The base model with its first `layers` layers alone and no final norm, for the time of the context."""
    base = model.model
    whole, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(list(whole)[:layers]), nn.Identity()
    try:
        yield base
    finally:
        base.layers, base.norm = whole, norm

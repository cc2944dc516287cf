"""Texts as a bank's own features see them: activations from one truncated forward pass, kept and taken up again.

A refresh needs no SAE and no other row than those the bank holds: what they give on a text is a sparse matrix, a few
dozen features a token, which is all that heads are fitted, calibrated and measured on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse

from feature_bank.atomic import atomic_file
from feature_bank.bank import WEIGHTS, Bank
from feature_bank.errors import DataError
from feature_bank.identity import weights_digest
from guard.capture import length_batches, pad_batch, truncated_forward
from training.corpus import Document, TokenSequence, tokenise
from training.sweep import Reporter

__all__ = ["Texts", "encode_texts", "join_texts", "rows_digest"]

Ints = npt.NDArray[np.int64]
MAX_TOKENS = 160  # of a text, as of the labelled texts that banks are trained on
SHARD_TEXTS = 512
BATCH_TOKENS = 2048
_PARTS = ("data", "indices", "indptr", "texts")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What features give on every judged token of n texts."""

    acts: sparse.csr_matrix
    """(tokens, F) normalised activations, float32, in the bank's order."""
    text: Ints
    """(tokens,) the text of every row; rows of one are consecutive."""
    segment: Ints
    """(tokens,) the segment of every row, numbered over all texts: windows do not cross segments."""
    n: int
    """Texts; one may have no row."""
    ceiling: float | None = None
    """What the activations have been clipped to."""

    def narrow(self, columns: Ints, ceiling: float) -> Texts:
        """The same with some of the features, clipped as heads read them."""
        acts = self.acts[:, columns].tocsr()
        acts.data = np.minimum(acts.data, np.float32(ceiling))
        return replace(self, acts=acts, ceiling=ceiling)

    def choose(self, rows: Ints) -> Texts:
        """Some of the texts, in the order of their numbers; they are numbered anew."""
        wanted = np.unique(rows)
        kept = np.flatnonzero(np.isin(self.text, wanted))
        return Texts(
            acts=self.acts[kept],
            text=np.searchsorted(wanted, self.text[kept]),
            segment=np.unique(self.segment[kept], return_inverse=True)[1].astype(np.int64),
            n=len(wanted),
            ceiling=self.ceiling,
        )


def join_texts(parts: Sequence[Texts], features: int) -> Texts:
    """All texts of the parts, in order. features: the number of columns, if there is no part."""
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Texts(acts=sparse.csr_matrix((0, features), dtype=np.float32), text=empty, segment=empty, n=0)
    texts = np.cumsum([0, *(part.n for part in parts)])
    segments = np.cumsum([0, *(int(part.segment.max(initial=-1)) + 1 for part in parts)])
    return Texts(
        acts=sparse.vstack([part.acts for part in parts], format="csr"),
        text=np.concatenate([part.text + first for part, first in zip(parts, texts, strict=False)]),
        segment=np.concatenate([part.segment + first for part, first in zip(parts, segments, strict=False)]),
        n=int(texts[-1]),
    )


def encode_texts(
    documents: Sequence[Document],
    *,
    bank: Bank,
    model: Any,
    tokenizer: Any,
    folder: Path,
    report: Reporter,
    max_tokens: int = MAX_TOKENS,
) -> Texts:
    """What the bank's rows give on the documents, each as one segment.

    Kept in `folder`, 512 documents a file: a second run takes up what is there, if rows, model and text are the same.

    Raises DataError if the model gives NaN or infinity.
    """
    made_of = f"{rows_digest(bank)} {weights_digest(model)} {max_tokens}"
    parts: list[Texts] = []
    for start in range(0, len(documents), SHARD_TEXTS):
        chosen = documents[start : start + SHARD_TEXTS]
        key = hashlib.sha256(json.dumps([made_of, [[d.role, d.text] for d in chosen]]).encode()).hexdigest()
        path = folder / f"texts-{key[:24]}.safetensors"
        found = _read(path, key, len(bank.features), len(chosen))
        if found is None:
            found = _encode(chosen, bank, model, tokenizer, max_tokens)
            _write(path, key, found)
        parts.append(found)
        report("encode", min(start + SHARD_TEXTS, len(documents)), len(documents), "replayed texts")
    return join_texts(parts, len(bank.features))


def rows_digest(bank: Bank) -> str:
    """sha256 of all that activations depend on: model, rows, order and scales. Versions that differ only in heads,
    labels and explanations have the same."""
    manifest = bank.manifest
    parts = [
        manifest.model.model_dump(),
        manifest.files[WEIGHTS],
        list(bank.hook_names),
        [[feature.id, feature.scale] for feature in bank.features],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _encode(documents: Sequence[Document], bank: Bank, model: Any, tokenizer: Any, max_tokens: int) -> Texts:
    sequences = [s for s in tokenise(documents, tokenizer, max_tokens=max_tokens) if len(s.positions)]
    scale = np.array([feature.scale for feature in bank.features], dtype=np.float32)
    found: dict[int, sparse.csr_matrix] = {}
    for batch in length_batches([len(s.ids) for s in sequences], BATCH_TOKENS):
        members = [sequences[i] for i in batch]
        for member, acts in zip(members, _batch(members, bank, model), strict=True):
            found[member.document] = sparse.csr_matrix(np.minimum(acts / scale, 6e4).astype(np.float16).astype("f4"))
    order = sorted(found)
    numbers = np.repeat(np.array(order, dtype=np.int64), [found[i].shape[0] for i in order])
    acts = sparse.vstack([found[i] for i in order], format="csr") if order else join_texts([], len(scale)).acts
    return Texts(acts=acts, text=numbers, segment=numbers, n=len(documents))


def _batch(members: Sequence[TokenSequence], bank: Bank, model: Any) -> list[npt.NDArray[np.float32]]:
    """(n, F) of every member, not yet divided by the scales."""
    ids, mask = pad_batch([s.ids for s in members], 0, next(model.parameters()).device)
    hidden = truncated_forward(model, bank.hook_names, ids, mask)
    found = []
    for row, member in enumerate(members):
        parts = []
        for name in bank.hook_names:
            rows = bank.rows[name]
            x = hidden[name][row, torch.from_numpy(member.positions).to(ids.device)].float().cpu().numpy()
            pre = x @ rows.W_enc + rows.b_enc
            parts.append(np.where(pre > rows.threshold, pre, np.float32(0.0)) if np.isfinite(pre).all() else None)
        if any(part is None for part in parts):
            raise DataError("the model gave NaN or infinity on a replayed text; check its weights and dtype")
        found.append(np.concatenate([part for part in parts if part is not None], axis=1))
    return found


def _write(path: Path, key: str, texts: Texts) -> None:
    tensors = {
        "data": texts.acts.data.astype(np.float16),
        "indices": texts.acts.indices.astype(np.int32),
        "indptr": texts.acts.indptr.astype(np.int64),
        "texts": texts.text,
    }
    with atomic_file(path) as tmp:
        save_file(tensors, tmp, metadata={"key": key})


def _read(path: Path, key: str, features: int, n: int) -> Texts | None:
    """The texts that a file holds; None if it is missing, torn or of other texts."""
    if not path.exists():
        return None
    with suppress(SafetensorError, ValueError), safe_open(path, framework="np") as tensors:
        if (tensors.metadata() or {}).get("key") == key:
            data, indices, indptr, texts = (tensors.get_tensor(name) for name in _PARTS)
            matrix = sparse.csr_matrix((data.astype(np.float32), indices, indptr), shape=(len(texts), features))
            return Texts(acts=matrix, text=texts, segment=texts, n=n)
    return None

"""The labelled rows that the detectors are fitted on and judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError
from feature_bank.schema import CorpusRecord
from feature_bank.taxonomy import load_taxonomy
from training.contrast import taxonomy_texts
from training.corpus import Document, read_documents, read_rows

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
CORPORA = Path(__file__).parents[1] / "training" / "corpora"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """`fit` is what the baselines learn from; `evaluated` is dev followed by the own test rows."""

    fit: list[Document]
    evaluated: list[Document]
    is_own: Bools
    records: list[CorpusRecord]

    def select(self, domain: str, *, own: bool, unseen: bool = False) -> tuple[npt.NDArray[np.int64], Bools]:
        """(indices into `evaluated`, labels) of rows with a known label; `unseen`: of sources not in fit."""
        seen = {d.source for d in self.fit}
        rows = [
            i
            for i, d in enumerate(self.evaluated)
            if domain in d.known and bool(self.is_own[i]) == own and not (unseen and d.source in seen)
        ]
        return np.array(rows, dtype=np.int64), np.array([domain in self.evaluated[i].domains for i in rows], dtype=bool)


def read_all(data: Path, limit: int | None, sample: int | None = None) -> Rows:
    """Read everything; `limit` keeps that many rows of each part, `sample` that many of dev alone, chosen by hash."""
    own_files = sorted(CORPORA.glob("*.jsonl"))
    held_out = {row["id"] for path in own_files for _, row in read_rows(path) if row.get("split") == "test"}
    fit, fit_records = read_documents([data / "fit.jsonl.gz"])
    dev, dev_records = read_documents([data / "dev.jsonl.gz"])
    own, own_records = read_documents(own_files)
    own = [d for d in own if d.known]
    learnt = {(d.text, d.role) for d in fit}
    repeats = [d.id for d in dev if (d.text, d.role) in learnt]
    if repeats:
        raise DataError(f"dev.jsonl.gz repeats rows of fit.jsonl.gz, the first with id {repeats[0]!r}; remove them")
    own_fit = _sample([d for d in own if d.id not in held_out], limit)
    own_test = _sample([d for d in own if d.id in held_out], limit)
    dev = _sample(dev, limit if sample is None else sample)
    return Rows(
        fit=_sample(fit, limit) + own_fit,
        evaluated=dev + own_test,
        is_own=np.arange(len(dev) + len(own_test)) >= len(dev),
        records=fit_records + dev_records + own_records,
    )


def contrast_rows() -> list[Document]:
    """The taxonomy's train pairs and hard negatives: the bank's concept directions learn from them."""
    texts = taxonomy_texts(load_taxonomy(None))
    return [d for d in texts.documents if d.split != "test"]


def _sample(documents: list[Document], limit: int | None) -> list[Document]:
    if limit is None:
        return documents
    return sorted(documents, key=lambda d: hashlib.sha256(d.id.encode()).digest())[:limit]


def known_labels(documents: Sequence[Document], domain: str) -> tuple[npt.NDArray[np.int64], Bools]:
    """(indices of the documents whose label is known, labels)."""
    known = np.array([i for i, d in enumerate(documents) if domain in d.known], dtype=np.int64)
    return known, np.array([domain in documents[i].domains for i in known], dtype=bool)

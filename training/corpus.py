"""Rows of text: reading and checking them, splitting them by hash, turning them into token sequences."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from feature_bank.errors import DataError
from feature_bank.layout import ROLES, Role, Tokenizer, clean, head_ids, render, scored_positions
from feature_bank.schema import CorpusRecord
from feature_bank.taxonomy import DOMAINS

Split = Literal["discovery", "calibration", "test"]
OWN_SOURCE = "sailguard"  # rows written for the project: the only ones that may be quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One row. `known` lists the domains whose label is known; outside it a document is unlabelled, not negative."""

    id: str
    text: str
    role: Role
    domains: frozenset[str]
    known: frozenset[str]
    source: str
    licence: str
    split: Split

    def label(self, domain: str) -> bool | None:
        """Whether the domain is present; None if that is not known."""
        return domain in self.domains if domain in self.known else None


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file, gzipped or not, a line in memory at a time.

    Raises DataError naming the file and line for anything that is not a JSON object.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}, line {number}: not valid JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, field 'text': expected an object with a string field 'text'")
        yield number, row


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read: {e}") from e


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_objects`, each with a string `text`. Raises DataError naming the file and line of one without."""
    for number, row in read_objects(path):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{path}, line {number}, field 'text': expected an object with a string field 'text'")
        yield number, row


def split_of(document_id: str) -> Split:
    """70 % discovery, 20 % calibration, 10 % test, decided by the id's hash alone."""
    bucket = int(hashlib.sha256(document_id.encode()).hexdigest()[:8], 16) % 10
    return "discovery" if bucket < 7 else "calibration" if bucket < 9 else "test"


def read_documents(paths: Sequence[Path]) -> tuple[list[Document], list[CorpusRecord]]:
    """All documents of the files, exact repeats of a text with the same role dropped, and the provenance of each file.

    Rows need only `text`; `id`, `role`, `domains`, `known`, `source`, `licence` are optional. A row with `split` "test"
    is kept out of fitting. Raises DataError naming file, line and field.
    """
    documents: list[Document] = []
    records: list[CorpusRecord] = []
    seen: set[tuple[str, str]] = set()
    for path in paths:
        licences: set[str] = set()
        rows = 0
        for number, row in read_rows(path):
            where = f"{path}, line {number}"
            rows += 1
            text = clean(row["text"])
            role = "passage" if row.get("role") is None else row["role"]
            if role not in ROLES:
                raise DataError(f"{where}, field 'role': {role!r} is not one of {', '.join(ROLES)}")
            domains, known = _labels(row, "domains", where), _labels(row, "known", where)
            source, licence = (clean(str(row.get(field, "unknown"))) for field in ("source", "licence"))
            licences.add(licence)
            if (text, role) in seen or not text.strip():
                continue
            seen.add((text, role))
            document_id = clean(str(row.get("id") or hashlib.sha256(text.encode()).hexdigest()[:16]))
            documents.append(
                Document(
                    id=document_id,
                    text=text,
                    role=role,
                    domains=domains,
                    known=known | domains,
                    source=source,
                    licence=licence,
                    split="test" if row.get("split") == "test" else split_of(_pair(document_id, row)),
                )
            )
        records.append(
            CorpusRecord(
                name=path.name.removesuffix(".gz"),
                licence=", ".join(sorted(licences)),
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                rows=rows,
            )
        )
    if not documents:
        raise DataError("the files hold no text")
    return documents, records


def _labels(row: dict[str, Any], field: str, where: str) -> frozenset[str]:
    values = [] if row.get(field) is None else row[field]
    if not isinstance(values, list) or any(v not in DOMAINS for v in values):
        raise DataError(f"{where}, field {field!r}: expected a list of {', '.join(DOMAINS)}; found {values!r}")
    return frozenset(values)


def corpus_hash(documents: Iterable[Document]) -> str:
    """sha256 over ids, roles, texts and labels, in order."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(json.dumps([d.id, d.role, d.text, sorted(d.domains), sorted(d.known), d.split]).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """A document as the model reads it, and the positions whose activations count."""

    document: int
    ids: list[int]
    positions: npt.NDArray[np.int64]
    special: int = 0
    """How many of `ids` are special tokens."""


def tokenise(documents: Sequence[Document], tokenizer: Tokenizer, *, max_tokens: int) -> list[TokenSequence]:
    """One sequence a document, at most `max_tokens` of its own text each (the template around it not counted)."""
    special = frozenset(tokenizer.all_special_ids)
    heads = {role: head_ids(tokenizer, role) for role in sorted({d.role for d in documents})}
    sequences = []
    for index, document in enumerate(documents):
        head = heads[document.role]
        rendered = render(tokenizer, document.text, document.role, max_tokens=len(head) + max_tokens, head=head)
        positions = scored_positions(rendered, special)
        if len(positions):
            count = sum(token in special for token in rendered.ids)
            sequences.append(TokenSequence(document=index, ids=rendered.ids, positions=positions, special=count))
    return sequences


def _pair(document_id: str, row: dict[str, Any]) -> str:
    """A contrast pair is split as one: both sides under the smaller id."""
    twin = row.get("twin")
    return min(document_id, clean(twin)) if isinstance(twin, str) else document_id

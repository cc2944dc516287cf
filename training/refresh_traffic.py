"""Texts of the spool, where the operator consented to their being kept, as documents that another bank can read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from feature_bank.atomic import atomic_file
from feature_bank.layout import Role
from feature_bank.spool import Selection, Spool, SpoolItem
from training.corpus import Document, split_of

__all__ = ["document_of", "held_out", "write_traffic"]

SOURCE = "traffic"
LICENCE = "the operator's traffic"
UNMARKED = 20_000  # the newest texts that nobody marked: SAEs are trained on them, heads are not
HELD_OUT = 5  # one marked item of so many is never fitted on
_PASSAGES = ("moderations", "traces")


def document_of(item: SpoolItem, labels: Mapping[str, bool]) -> Document:
    """An item that has its text. labels: what people said of it, by domain; nothing is known of the others."""
    role: Role = "response" if item.phase == "response" else "passage" if item.endpoint in _PASSAGES else "prompt"
    name = f"{SOURCE}-{item.id}"
    return Document(
        id=name,
        text=item.text or "",
        role=role,
        domains=frozenset(domain for domain, said in labels.items() if said),
        known=frozenset(labels),
        source=SOURCE,
        licence=LICENCE,
        split=split_of(name),
    )


def held_out(item: SpoolItem) -> bool:
    """Whether a marked item is never fitted on: by the hash of what was judged, so that a text that comes twice is on
    one side. Of an item without activations no."""
    return int(hashlib.sha256(item.acts or b"").hexdigest()[:8], 16) % HELD_OUT == 0


def write_traffic(spool: Path, path: Path, domains: Collection[str]) -> int:
    """Write texts of the spool to `path`, as rows that training reads, for this user alone; returns how many.

    They are those of marked items that are not held out, with their labels in `domains`, and of the newest unmarked.
    """
    found: list[Document] = []
    with Spool.open_for_reading(spool) as opened:
        for item, said in opened.marked():
            if item.text and not held_out(item):
                found.append(document_of(item, {name: label for name, label in said.items() if name in domains}))
        for item in opened.newest(Selection(marked=False), limit=UNMARKED):
            if item.text:
                found.append(document_of(item, {}))
    with atomic_file(path) as tmp:
        tmp.chmod(0o600)
        with tmp.open("w", encoding="utf-8") as file:
            for document in found:
                row = {name: getattr(document, name) for name in ("id", "text", "role", "source", "licence")}
                row |= {"domains": sorted(document.domains), "known": sorted(document.known)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(found)

"""A feature collection: what others published of features, kept as they said it. It has no weights and is no bank.

A collection is a folder:

    collection.json       its kind, where it came from, what was lost on the way, sha256 of the features
    features.jsonl        one feature a line

A bank is made of one when the rows of an SAE are joined to it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from feature_bank.atomic import atomic_folder
from feature_bank.errors import BankError
from feature_bank.interop.records import ImportedFeature, Loss, SourceFile
from feature_bank.schema import Record, Sha256
from feature_bank.taxonomy import DOMAINS

__all__ = [
    "MANIFEST",
    "Collection",
    "CollectionManifest",
    "holds_collection",
    "load_collection",
    "save_collection",
]

MANIFEST = "collection.json"
FEATURES = "features.jsonl"
KIND: Literal["sailguard-collection"] = "sailguard-collection"
OWN_FILES = frozenset({MANIFEST, FEATURES})

R = TypeVar("R", bound=Record)


class CollectionManifest(Record):
    """collection.json"""

    kind: Literal["sailguard-collection"]
    schema_version: Literal[1]
    name: str
    source: Literal["safe-sail", "neuronpedia"]
    files: list[SourceFile]
    model: str | None = None
    """The language model, as the source names it."""
    features: int = Field(ge=0)
    losses: list[Loss] = Field(default_factory=list)
    tool_version: str
    features_sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A collection in memory, in the order of its source."""

    name: str
    source: Literal["safe-sail", "neuronpedia"]
    files: tuple[SourceFile, ...]
    features: tuple[ImportedFeature, ...]
    losses: tuple[Loss, ...] = ()
    model: str | None = None

    @cached_property
    def by_id(self) -> dict[str, ImportedFeature]:
        """The features by their ids."""
        return {feature.id: feature for feature in self.features}

    @property
    def tagged(self) -> tuple[ImportedFeature, ...]:
        """Those with at least one domain."""
        return tuple(feature for feature in self.features if feature.domains)

    def search(
        self,
        text: str = "",
        *,
        domain: str | None = None,
        layer: int | None = None,
        min_scores: Mapping[str, float] | None = None,
    ) -> list[ImportedFeature]:
        """The features of which an explanation (or the id) has all the words of `text`, whatever their case.

        min_scores: a feature without a score that is named here is left out.
        """
        words = text.casefold().split()
        found = []
        for feature in self.features:
            if domain is not None and domain not in feature.domains:
                continue
            if layer is not None and feature.layer != layer:
                continue
            if any(feature.scores.get(name, -float("inf")) < least for name, least in (min_scores or {}).items()):
                continue
            searched = " ".join((feature.id, *(e.text for e in feature.explanations))).casefold()
            if all(word in searched for word in words):
                found.append(feature)
        return found

    def counts(self) -> dict[str, Any]:
        """Figures for a summary: features, by domain and by layer, and what is known of their explanations."""
        return counts(self.features)


def counts(features: Iterable[ImportedFeature]) -> dict[str, Any]:
    """How many features there are, are tagged (by domain, by layer, by both), are masked, and have no explanation."""
    rows = list(features)
    tagged = [feature for feature in rows if feature.domains]
    domains = Counter(domain for feature in tagged for domain in feature.domains)
    return {
        "features": len(rows),
        "tagged": len(tagged),
        "tagged_by_domain": {domain: domains[domain] for domain in DOMAINS if domains[domain]},
        "tagged_by_layer": dict(sorted(Counter(feature.layer for feature in tagged).items())),
        "tagged_by_domain_and_layer": {
            domain: dict(sorted(Counter(f.layer for f in tagged if domain in f.domains).items()))
            for domain in DOMAINS
            if domains[domain]
        },
        "by_layer": dict(sorted(Counter(feature.layer for feature in rows).items())),
        "masked": sum(feature.masked for feature in rows),
        "unexplained": sum(not feature.explanations for feature in rows),
    }


def holds_collection(path: Path) -> bool:
    """Whether a folder is (or was meant to be) a collection."""
    return (path / MANIFEST).is_file()


def save_collection(folder: Path, collection: Collection, *, tool_version: str) -> Collection:
    """Write a collection atomically and read it back. Raises BankError if two features have the same id."""
    lines = "".join(f.model_dump_json(exclude_defaults=True) + "\n" for f in collection.features).encode()
    manifest = CollectionManifest(
        kind=KIND,
        schema_version=1,
        name=collection.name,
        source=collection.source,
        files=list(collection.files),
        model=collection.model,
        features=len(collection.features),
        losses=list(collection.losses),
        tool_version=tool_version,
        features_sha256=hashlib.sha256(lines).hexdigest(),
    )
    _check_ids(collection.features, str(folder))
    with atomic_folder(folder) as tmp:
        (tmp / FEATURES).write_bytes(lines)
        (tmp / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        load_collection(tmp)
    return load_collection(folder)


def load_collection(path: str | Path) -> Collection:
    """Read and verify a collection's folder. Raises BankError naming the file and the field that is wrong."""
    folder = Path(path)
    manifest = _parse(CollectionManifest, _read(folder / MANIFEST), MANIFEST)
    raw = _read(folder / FEATURES)
    if hashlib.sha256(raw).hexdigest() != manifest.features_sha256:
        raise BankError(
            f"its sha256 is not the one in {MANIFEST}; the file was altered or damaged, import it anew",
            file=FEATURES,
            field="sha256",
        )
    features = tuple(
        _parse(ImportedFeature, line, f"{FEATURES}:{number}") for number, line in enumerate(raw.split(b"\n"), 1) if line
    )
    if len(features) != manifest.features:
        raise BankError(f"{manifest.features} features are named, {len(features)} are there", file=MANIFEST)
    _check_ids(features, FEATURES)
    return Collection(
        name=manifest.name,
        source=manifest.source,
        files=tuple(manifest.files),
        features=features,
        losses=tuple(manifest.losses),
        model=manifest.model,
    )


def _check_ids(features: Sequence[ImportedFeature], file: str) -> None:
    seen: set[str] = set()
    for feature in features:
        if feature.id in seen:
            raise BankError(f"two features have the id {feature.id!r}", file=file, field="id")
        seen.add(feature.id)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as e:
        raise BankError(f"not found in {path.parent}; the folder is no collection", file=path.name) from e
    except OSError as e:
        raise BankError(f"cannot be read: {e.strerror}", file=str(path)) from e


def _parse(record: type[R], raw: bytes, file: str) -> R:
    try:
        return record.model_validate(json.loads(raw))
    except ValidationError as e:
        first = e.errors()[0]
        raise BankError(first["msg"], file=file, field=".".join(str(part) for part in first["loc"])) from e
    except (ValueError, RecursionError) as e:
        raise BankError(f"is not valid JSON: {e}", file=file) from e

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

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from feature_bank.atomic import atomic_folder
from feature_bank.errors import BankError
from feature_bank.schema import Explainer, FeatureRecord, Probability, Record, Sha256
from feature_bank.taxonomy import DOMAINS, Domain

__all__ = [
    "MANIFEST",
    "Collection",
    "CollectionManifest",
    "Example",
    "Histogram",
    "ImportedExplanation",
    "ImportedFeature",
    "Loss",
    "SourceFile",
    "holds_collection",
    "load_collection",
    "save_collection",
]

MANIFEST = "collection.json"
FEATURES = "features.jsonl"
KIND: Literal["sailguard-collection"] = "sailguard-collection"
OWN_FILES = frozenset({MANIFEST, FEATURES})

R = TypeVar("R", bound=Record)


class ImportedExplanation(Record):
    """One text about a feature, and how its publisher says it was made."""

    text: str
    kind: str | None = None
    """The publisher's name for the way it was made, such as `oai_token-act-pair`."""
    model: str | None = None
    """The language model that wrote it."""


class Histogram(Record):
    """Bars at the middle of their bins."""

    values: list[FiniteFloat]
    heights: list[FiniteFloat]

    @model_validator(mode="after")
    def _aligned(self) -> Histogram:
        if len(self.values) != len(self.heights):
            raise ValueError("values and heights must have one entry a bar")
        return self


class Example(Record):
    """A text on which the feature fires, and the interval of activations that it stands for, if one is named."""

    tokens: list[str] = Field(min_length=1)
    activations: list[FiniteFloat]
    """On each of `tokens`, in the activation's own units."""
    bin_min: FiniteFloat | None = None
    bin_max: FiniteFloat | None = None
    bin_contains: FiniteFloat | None = None
    """Share of the activations that lie in the interval."""

    @model_validator(mode="after")
    def _aligned(self) -> Example:
        if len(self.tokens) != len(self.activations):
            raise ValueError("tokens and activations must have one entry a token")
        return self


class ImportedFeature(Record):
    """A feature as its publisher describes it. What was not published stays empty; nothing is filled in."""

    id: str = Field(pattern=r"^L\d+/\d+$")
    layer: int = Field(ge=0)
    index: int = Field(ge=0)
    hook_name: str | None = None
    domains: list[Domain] = Field(default_factory=list)
    """The publisher's tags."""
    explanations: list[ImportedExplanation] = Field(default_factory=list)
    """The publisher's, in its order. Empty: none was published."""
    masked: bool = False
    """Whether the publisher holds the explanation back and shows a mask in its place."""
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)
    density: Probability | None = None
    """Share of tokens on which it fires."""
    max_activation: FiniteFloat | None = None
    """The largest that was seen, in the activation's own units."""
    histogram: Histogram | None = None
    """Of the activations above zero, in their own units."""
    logit_histogram: Histogram | None = None
    promoted_tokens: list[str] = Field(default_factory=list)
    promoted_logits: list[FiniteFloat] = Field(default_factory=list)
    suppressed_tokens: list[str] = Field(default_factory=list)
    suppressed_logits: list[FiniteFloat] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    vector: list[FiniteFloat] = Field(default_factory=list)
    """The decoder's direction, (d_in,)."""

    @model_validator(mode="after")
    def _consistent(self) -> ImportedFeature:
        if self.id != f"L{self.layer}/{self.index}":
            raise ValueError(f"{self.id!r} is not the id of feature {self.index} of layer {self.layer}")
        for tokens, logits in (
            (self.promoted_tokens, self.promoted_logits),
            (self.suppressed_tokens, self.suppressed_logits),
        ):
            if len(tokens) != len(logits):
                raise ValueError("tokens and their logits must have one entry a token")
        return self

    @property
    def explanation(self) -> str | None:
        """The first explanation, as published; None if there is none."""
        return self.explanations[0].text if self.explanations else None

    def to_record(
        self, *, hook_name: str, threshold: float, scale: float, density: float, **more: Any
    ) -> FeatureRecord:
        """The bank's record of it, with what only an SAE and text can tell; `more` are further fields of the record.

        An explanation that was never published becomes an empty text without an explainer; a masked one stays masked.
        """
        first = self.explanations[0] if self.explanations else None
        fields: dict[str, Any] = {
            "id": self.id,
            "hook_name": hook_name,
            "layer": self.layer,
            "index": self.index,
            "domains": self.domains,
            "explanation": first.text if first else "",
            "explainer": Explainer(method="imported", model=first.model) if first else None,
            "promoted_tokens": self.promoted_tokens,
            "threshold": threshold,
            "scale": scale,
            "density": density,
            **more,
            "scores": {**self.scores, **more.get("scores", {})},
        }
        return FeatureRecord(**fields)


class Loss(Record):
    """Something that one side holds and the other has no place for."""

    field: str
    count: int = Field(ge=0)
    """How many features (or files, or rows of a table) have it."""
    reason: str


class SourceFile(Record):
    """A file that was read."""

    name: str
    sha256: Sha256


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
    """`features`, `tagged`, `tagged_by_domain`, `tagged_by_layer`, `by_layer`, `masked` and `unexplained`."""
    rows = list(features)
    tagged = [feature for feature in rows if feature.domains]
    domains = Counter(domain for feature in tagged for domain in feature.domains)
    return {
        "features": len(rows),
        "tagged": len(tagged),
        "tagged_by_domain": {domain: domains[domain] for domain in DOMAINS if domains[domain]},
        "tagged_by_layer": dict(sorted(Counter(feature.layer for feature in tagged).items())),
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

"""The explained feature bank: a folder of records and weights, hashed, written atomically, verified on reading."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from feature_bank.atomic import atomic_folder
from feature_bank.errors import BankError
from feature_bank.journal import hold
from feature_bank.schema import (
    SCHEMA_VERSION,
    FeatureRecord,
    HeadRecord,
    Heads,
    HookRecord,
    Manifest,
    Pooling,
)

MANIFEST = "bank.json"
FEATURES = "features.jsonl"
WEIGHTS = "weights.safetensors"
HEADS = "heads.json"
REVIEWS = "reviews.jsonl"  # append-only, therefore outside the hashes
HASHED = (FEATURES, WEIGHTS, HEADS)
CURRENT = "current"  # in a folder of versions: the link to the one in use; see `feature_bank.versions`
SHIPPED = "smollm2-135m-instruct"
_TENSORS = ("W_enc", "W_dec", "b_enc", "threshold")
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')  # the last field of bank.json

R = TypeVar("R", bound=BaseModel)


def shipped_bank_path(name: str = SHIPPED) -> Path:
    """The folder of a bank that comes with the package."""
    return Path(__file__).parent / "banks" / name


def bank_folder(path: str | Path) -> Path:
    """The folder of the bank at `path`: of a folder of versions, the current one."""
    folder = Path(path)
    return folder / CURRENT if not (folder / MANIFEST).exists() and (folder / CURRENT).is_symlink() else folder


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The selected rows of one hook point's SAE; column i belongs to the i-th of the bank's features there."""

    W_enc: npt.NDArray[np.float32]  # (d_in, n_selected)
    W_dec: npt.NDArray[np.float32]  # (n_selected, d_in)
    b_enc: npt.NDArray[np.float32]  # (n_selected,), subtraction of b_dec folded in
    threshold: npt.NDArray[np.float32]  # (n_selected,)


@dataclass(frozen=True, kw_only=True)
class Bank:
    """A verified bank in memory. `features` are ordered by hook point, in the manifest's order."""

    manifest: Manifest
    features: tuple[FeatureRecord, ...]
    heads: Mapping[str, HeadRecord]
    pooling: Pooling
    rows: Mapping[str, Rows]
    content_hash: str
    """sha256 of bank.json, which holds the hash of every other file."""

    @cached_property
    def by_id(self) -> dict[str, FeatureRecord]:
        """The features by their ids."""
        return {feature.id: feature for feature in self.features}

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hook points in the manifest's order, which is the order of `features`."""
        return tuple(hook.hook_name for hook in self.manifest.hook_points)

    @property
    def version(self) -> str:
        """Name and version as verdicts carry them: `smollm2-135m-instruct@0.1.0+1a2b3c4d`."""
        return f"{self.manifest.name}@{self.manifest.version}+{self.content_hash[:8]}"

    @classmethod
    def load(cls, path: str | Path) -> Bank:
        """Read and verify a bank folder, or the current version in a folder of versions.

        Raises BankError naming the file and field for a missing or altered file, an unknown schema version, a
        malformed record, or records and weights that do not belong together.
        """
        # Links are followed once: the files are of one version, whatever becomes the current one meanwhile.
        folder = Path(os.path.realpath(bank_folder(path)))
        raw = _read(folder / MANIFEST)
        data = _json(raw, MANIFEST)
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else None
            raise BankError(
                f"{found!r} is unknown; this version reads {SCHEMA_VERSION}. Upgrade sailguard or rebuild the bank",
                file=MANIFEST,
                field="schema_version",
            )
        manifest = _parse(Manifest, data, MANIFEST)
        if seal(raw) != raw:
            raise BankError(
                "its sha256 is not that of the rest of the file; the file was altered or damaged, restore or rebuild "
                "the bank",
                file=MANIFEST,
                field="sha256",
            )
        contents = {}
        for name in HASHED:
            if name not in manifest.files:
                raise BankError("the manifest lists no hash of this file", file=MANIFEST, field=f"files.{name}")
            contents[name] = _read(folder / name)
            if hashlib.sha256(contents[name]).hexdigest() != manifest.files[name]:
                raise BankError(
                    "its sha256 is not the one in bank.json; the file was altered or damaged, restore or rebuild "
                    "the bank",
                    file=name,
                    field="sha256",
                )
        features = tuple(
            _parse(FeatureRecord, _json(line, f"{FEATURES}:{number}"), f"{FEATURES}:{number}")
            for number, line in enumerate(contents[FEATURES].removesuffix(b"\n").split(b"\n"), 1)
        )
        heads = _parse(Heads, _json(contents[HEADS], HEADS), HEADS)
        bank = cls(
            manifest=manifest,
            features=features,
            heads={str(domain): head for domain, head in heads.heads.items()},
            pooling=heads.pooling,
            rows=_load_rows(contents[WEIGHTS], manifest.hook_points),
            content_hash=hashlib.sha256(raw).hexdigest(),
        )
        bank._check_alignment()
        return bank

    def _check_alignment(self) -> None:
        expected = [hook.hook_name for hook in self.manifest.hook_points for _ in range(hook.n_selected)]
        if [feature.hook_name for feature in self.features] != expected:
            raise BankError(
                "the features do not match the rows of the weights one by one",
                file=FEATURES,
                field="hook_name",
            )
        for hook in self.manifest.hook_points:
            own = [feature for feature in self.features if feature.hook_name == hook.hook_name]
            beyond = next((f for f in own if (f.index >= hook.d_sae) != bool(f.direction)), None)
            if beyond is not None:
                raise BankError(
                    f"feature {beyond.id!r} is {'a' if beyond.direction else 'no'} direction, but the SAE has "
                    f"{hook.d_sae:,} features and only what lies beyond them is one",
                    file=FEATURES,
                    field="direction",
                )
            if sum(bool(feature.direction) for feature in own) != hook.n_directions:
                raise BankError(
                    f"{hook.hook_name} has not the {hook.n_directions} directions that its record counts",
                    file=MANIFEST,
                    field="n_directions",
                )
        if len(self.by_id) != len(self.features):
            raise BankError("two features have the same id", file=FEATURES, field="id")
        for domain, head in self.heads.items():
            for feature_id in head.features:
                if feature_id not in self.by_id:
                    raise BankError(
                        f"feature {feature_id!r} is not in the bank", file=HEADS, field=f"{domain}.features"
                    )
        for feature_id in self.manifest.canary.activations:
            if feature_id not in self.by_id:
                raise BankError(f"feature {feature_id!r} is not in the bank", file=MANIFEST, field="canary.activations")


def seal(raw: bytes) -> bytes:
    """The bytes of a bank.json with its last field, `sha256`, set to the digest of all the others.

    The digest is taken with zeros in its own place. Without such a field the bytes come back unchanged but
    for one added byte, so that they never count as sealed.
    """
    place = _SEAL.search(raw)
    if place is None:
        return raw + b"\0"
    start, stop = place.span(1)
    digest = hashlib.sha256(raw[:start] + b"0" * 64 + raw[stop:]).hexdigest()
    return raw[:start] + digest.encode() + raw[stop:]


def save_bank(
    folder: Path,
    *,
    manifest: Mapping[str, Any],
    features: Sequence[FeatureRecord],
    heads: Heads,
    rows: Mapping[str, Rows],
) -> Bank:
    """Write a bank atomically and read it back through the verifying reader. The reviews of one it replaces stay.

    manifest: the fields of `Manifest` without `schema_version`, `files` and `sha256`.
    """
    with _kept_reviews(folder) as reviews, atomic_folder(folder) as tmp:
        tensors: dict[str, npt.NDArray[Any]] = {}
        for hook_name, part in rows.items():
            # float16 halves the bank; its 11 bits are finer than the bfloat16 in which models are served
            tensors[f"{hook_name}.W_enc"] = np.ascontiguousarray(part.W_enc, dtype=np.float16)
            tensors[f"{hook_name}.W_dec"] = np.ascontiguousarray(part.W_dec, dtype=np.float16)
            tensors[f"{hook_name}.b_enc"] = np.ascontiguousarray(part.b_enc, dtype=np.float32)
            tensors[f"{hook_name}.threshold"] = np.ascontiguousarray(part.threshold, dtype=np.float32)
        save_file(tensors, tmp / WEIGHTS)
        lines = "".join(f.model_dump_json(exclude_defaults=True) + "\n" for f in features)
        (tmp / FEATURES).write_text(lines, encoding="utf-8")
        (tmp / HEADS).write_text(heads.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (tmp / REVIEWS).write_bytes(reviews)
        files = {name: hashlib.sha256((tmp / name).read_bytes()).hexdigest() for name in HASHED}
        complete = Manifest.model_validate(
            {**manifest, "schema_version": SCHEMA_VERSION, "files": files, "sha256": "0" * 64}
        )
        (tmp / MANIFEST).write_bytes(seal(complete.model_dump_json(indent=2).encode() + b"\n"))
        Bank.load(tmp)
    return Bank.load(folder)


@contextmanager
def _kept_reviews(folder: Path) -> Iterator[bytes]:
    """The reviews of the bank that is being replaced. Who wants to add one waits until the new bank is there."""
    if (folder / REVIEWS).exists():
        with hold(folder / REVIEWS) as journal:
            yield journal.raw()
    else:
        yield b""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as e:
        hint = "the folder is no bank" if path.name == MANIFEST else "the bank is incomplete, restore or rebuild it"
        raise BankError(f"not found in {path.parent}; {hint}", file=path.name) from e
    except OSError as e:
        raise BankError(f"cannot be read: {e.strerror}", file=str(path)) from e


def _json(raw: bytes, file: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise BankError(f"is not valid JSON: {e}", file=file) from e


def _parse(record: type[R], data: Any, file: str) -> R:
    try:
        return record.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        raise BankError(first["msg"], file=file, field=".".join(str(part) for part in first["loc"])) from e


def _load_rows(raw: bytes, hooks: Sequence[HookRecord]) -> dict[str, Rows]:
    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError) as e:  # KeyError: a dtype that numpy does not have
        raise BankError(f"unreadable: {e}", file=WEIGHTS) from e
    rows = {}
    for hook in hooks:
        d_in, n = hook.d_in, hook.n_selected
        shapes = dict(zip(_TENSORS, ((d_in, n), (n, d_in), (n,), (n,)), strict=True))
        parts = {}
        for name, shape in shapes.items():
            field = f"{hook.hook_name}.{name}"
            if field not in tensors:
                raise BankError("the tensor is missing", file=WEIGHTS, field=field)
            part = tensors[field]
            if part.shape != shape:
                raise BankError(
                    f"shape {part.shape} does not fit d_in {d_in} and {n} features; expected {shape}",
                    file=WEIGHTS,
                    field=field,
                )
            parts[name] = part.astype(np.float32)
            if not np.isfinite(parts[name]).all():
                raise BankError("holds NaN or infinity", file=WEIGHTS, field=field)
        rows[hook.hook_name] = Rows(**parts)
    return rows

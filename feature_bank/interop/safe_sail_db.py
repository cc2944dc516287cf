"""Safe-SAIL's published feature database: `{"LAYER_INDEX": {"explanation", "correlation_score", "tag_list"}}`.

The file holds features of Qwen2.5-3B-Instruct at the output of `mlp.down_proj` of layers 0, 8, 17, 26 and 35, as JSON,
gzipped or not. An explanation that is held back reads `***`; one that does not exist is null. Both stay what they are.
The correlation score compares predicted with true activations; on which text, over how many segments and with which
interval is not said, so it is kept as a plain score and not as a measured one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from feature_bank.errors import BankError
from feature_bank.interop.collection import Collection
from feature_bank.interop.records import ImportedExplanation, ImportedFeature, Loss, SourceFile
from feature_bank.taxonomy import DOMAINS, Domain

__all__ = ["MASK", "MODEL", "SCORE", "read_safe_sail"]

MASK = "***"
MODEL = "Qwen/Qwen2.5-3B-Instruct"
SCORE = "corr_safe_sail"
_KEY = re.compile(r"(0|[1-9][0-9]*)_(0|[1-9][0-9]*)")
_FIELDS = frozenset({"explanation", "correlation_score", "tag_list"})


def read_safe_sail(path: Path, *, model: str = MODEL) -> Collection:
    """Read the database: all features, in the order of layer and index.

    model: the language model that the features are of; the file does not name it.

    Raises BankError naming the file and the feature and field that are malformed.
    """
    raw = _read(path)
    data = _parse(raw, path)
    features, unknown = [], dict[str, int]()
    for key, row in data.items():
        features.append(_feature(key, row, path))
        for field in row.keys() - _FIELDS:
            unknown[field] = unknown.get(field, 0) + 1
    losses = [
        Loss(field=field, count=count, reason="is not part of the layout as published, and its meaning is not known")
        for field, count in sorted(unknown.items())
    ]
    return Collection(
        name=path.name.removesuffix(".gz").removesuffix(".json"),
        source="safe-sail",
        files=(SourceFile(name=path.name, sha256=hashlib.sha256(raw).hexdigest()),),
        features=tuple(sorted(features, key=lambda f: (f.layer, f.index))),
        losses=tuple(losses),
        model=model,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise BankError(f"cannot be read: {e.strerror or e}", file=str(path)) from e


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise BankError(f"cannot be unpacked, perhaps half-written: {e}", file=str(path)) from e

    def distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BankError("stands in the file twice", file=str(path), field=name)
            found[name] = value
        return found

    try:
        data = json.loads(raw, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as e:
        raise BankError(f"is not valid JSON: {e}", file=str(path)) from e
    if not isinstance(data, dict) or not data:
        raise BankError("must hold an object with one entry a feature", file=str(path))
    return data


def _feature(key: str, row: Any, path: Path) -> ImportedFeature:
    place = _KEY.fullmatch(key)
    if place is None:
        raise BankError("a feature is named LAYER_INDEX, such as 17_2031", file=str(path), field=key)

    def wrong(field: str, message: str) -> BankError:
        return BankError(message, file=str(path), field=f"{key}.{field}")

    if not isinstance(row, dict):
        raise BankError(f"{type(row).__name__} is no object", file=str(path), field=key)
    for field in sorted(_FIELDS - row.keys()):
        raise wrong(field, "missing")
    explanation, score, tags = row["explanation"], row["correlation_score"], row["tag_list"]
    if explanation is not None and not isinstance(explanation, str):
        raise wrong("explanation", f"{type(explanation).__name__} is neither text nor null")
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1 <= score <= 1:
        raise wrong("correlation_score", f"{score!r} is no number from -1 to 1")
    if not isinstance(tags, list) or any(tag not in DOMAINS for tag in tags) or len(set(tags)) != len(tags):
        raise wrong("tag_list", f"{tags!r} is no list of different tags out of {', '.join(DOMAINS)}")
    if explanation is not None and not _is_unicode(explanation):
        raise wrong("explanation", "holds half of a surrogate pair, which is no text")
    layer, index = int(place[1]), int(place[2])
    return ImportedFeature(
        id=f"L{layer}/{index}",
        layer=layer,
        index=index,
        hook_name=f"blocks.{layer}.hook_mlp_out",
        domains=cast(list[Domain], tags),
        explanations=[] if explanation is None else [ImportedExplanation(text=explanation)],
        masked=explanation == MASK,
        scores={SCORE: float(score)},
    )


def _is_unicode(text: str) -> bool:
    """JSON can spell text that no file can be written with."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

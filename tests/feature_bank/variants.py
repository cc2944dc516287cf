"""Versions of a bank: the same one with something changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from feature_bank.bank import Bank, save_bank
from feature_bank.schema import FeatureRecord, HeadRecord, Heads

SEALED = ("schema_version", "files", "sha256")


def write_variant(
    bank: Bank,
    folder: Path,
    *,
    features: Callable[[FeatureRecord], Mapping[str, Any]] | None = None,
    heads: Callable[[str, HeadRecord], Mapping[str, Any]] | None = None,
    **manifest: Any,
) -> Bank:
    """Write `bank` to `folder` with other fields: of the manifest, and what the functions give for each record."""
    fields = {name: value for name, value in bank.manifest.model_dump().items() if name not in SEALED}
    changed = {d: h.model_copy(update=dict(heads(d, h)) if heads else {}) for d, h in bank.heads.items()}
    return save_bank(
        folder,
        manifest={**fields, **manifest},
        features=[f.model_copy(update=dict(features(f)) if features else {}) for f in bank.features],
        heads=Heads(pooling=bank.pooling, heads=changed),  # type: ignore[arg-type]  # keys are domains
        rows=bank.rows,
    )

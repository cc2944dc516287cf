"""What a language model is shown of each feature, as a file in a bank's work folder: one JSON line a feature.

It quotes text of the corpus, so it belongs in the work folder and never in a bank.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError
from training.explain.interface import Excerpt, FeatureEvidence
from training.simulation.llm import SegmentText

MATERIAL_FILE = "explanation-material.jsonl.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """A feature's evidence, and the segments of the test split on which its explanation is put to the test."""

    evidence: FeatureEvidence
    segments: tuple[SegmentText, ...] = ()


_MATERIAL = TypeAdapter(Material)


def save_material(path: Path, material: Iterable[Material]) -> None:
    """Write the file, whole or not at all."""
    with atomic_file(path) as file, gzip.GzipFile(file, "wb", mtime=0) as out:
        for feature in material:
            out.write(_MATERIAL.dump_json(feature) + b"\n")


def load_material(path: Path, ids: Collection[str] | None = None) -> dict[str, Material]:
    """Read the file's features, or those among `ids`, by id in the file's order.

    Raises DataError, naming the line, for a file that is missing, cut short or not of this form.
    """
    found: dict[str, Material] = {}
    number = 0
    try:
        with gzip.open(path, "rb") as lines:
            for line in lines:
                number += 1
                feature = _MATERIAL.validate_json(line)
                _check(feature)
                if ids is None or feature.evidence.id in ids:
                    found[feature.evidence.id] = feature
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; --work must be the work folder of the run that trained the bank"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read beyond line {number} ({error}); run the training again") from error
    except (ValidationError, ValueError) as error:
        message = error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{path} line {number}: {message}; run the training again") from None
    return found


def _check(feature: Material) -> None:
    shown: list[Excerpt | SegmentText] = [*feature.evidence.positives, *feature.evidence.negatives, *feature.segments]
    for piece in shown:
        if len(piece.tokens) != len(piece.activations):
            raise ValueError("tokens and activations must have one entry a token")
        if not all(map(math.isfinite, piece.activations)):
            raise ValueError("activations must be finite")

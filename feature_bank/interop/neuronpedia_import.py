"""An export of Neuronpedia (or batch files of SAEDashboard) as a collection, and the list of what was left behind."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from feature_bank.errors import BankError
from feature_bank.interop.collection import Collection
from feature_bank.interop.neuronpedia import (
    ACTIVATION_COLUMNS,
    EXPLANATION_COLUMNS,
    FEATURE_COLUMNS,
    layer_of,
    read_lines,
)
from feature_bank.interop.neuronpedia_rows import ActivationRow, ExplanationRow, FeatureRow, Row, malformed
from feature_bank.interop.records import (
    Example,
    Histogram,
    ImportedExplanation,
    ImportedFeature,
    Loss,
    SourceFile,
)

__all__ = ["read_neuronpedia"]

_TOKEN_COLUMNS = {"maxValue", "minValue", "maxValueTokenIndex"}  # follow from values
_NAMING = {"modelId", "layer", "sourceSetName", "hasVector"}  # said once, or by something else that is kept
_REASONS = {
    "id": "rows are numbered anew",
    "creatorId": "users of a site are not features",
    "authorId": "users of a site are not features",
    "createdAt": "a collection keeps no times of rows",
    "vectorDefaultSteerStrength": "how to steer is policy, and a collection steers nothing",
    "embedding": "an embedding belongs to its own search index",
}
_NO_PLACE = "a collection has no place for it"


R = TypeVar("R", bound=Row)


class _Reader:
    """Gathers the rows of all sources; counts what is dropped."""

    def __init__(self) -> None:
        self.features: dict[str, ImportedFeature] = {}
        self.models: set[str] = set()
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.files: list[Path] = []

    def source(self, folder: Path) -> None:
        """Read one source's folder of an export."""
        rows = {f.index: (place, f) for place, f in self._rows(folder, "features", FeatureRow, FEATURE_COLUMNS)}
        explanations: dict[int, list[ImportedExplanation]] = {}
        for name in sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name.startswith("explanations")):
            for _, e in self._rows(folder, name, ExplanationRow, EXPLANATION_COLUMNS):
                text = ImportedExplanation(text=e.description, kind=e.typeName, model=e.explanationModelName)
                explanations.setdefault(e.index, []).append(text)
        examples: dict[int, list[Example]] = {}
        for place, a in self._rows(folder, "activations", ActivationRow, ACTIVATION_COLUMNS):
            examples.setdefault(a.index, []).append(_example(a, place))
        for index in sorted(rows.keys() | explanations.keys() | examples.keys()):
            place, row = rows.get(index, (str(folder), FeatureRow(index=index)))
            self.add(folder.name, row, explanations.get(index, []), examples.get(index, []), place)

    def batch(self, path: Path) -> None:
        """Read one `batch-N.json` as SAEDashboard's runner writes it."""
        self.files.append(path)
        try:
            data = json.loads(path.read_bytes())
            source, features = f"{int(data['layer'])}-{data['sae_set']}", list(data["features"])
            self.models.add(str(data["model_id"]))
        except OSError as e:
            raise BankError(f"cannot be read: {e.strerror or e}", file=str(path)) from e
        except (ValueError, RecursionError, KeyError, TypeError) as e:
            raise BankError(f"is no batch of SAEDashboard ({e!r})", file=str(path)) from e
        for number, found in enumerate(features):
            place = f"{path}:features.{number}"
            if not isinstance(found, dict) or not isinstance(found.get("activations", []), list):
                raise BankError("is no feature of SAEDashboard", file=place)
            row = {name: value for name, value in found.items() if name not in ("feature_index", "activations")}
            examples = []
            for activation in found.get("activations", []):
                kept = self._keep(_renamed(activation), ActivationRow, ACTIVATION_COLUMNS, "activations", place)
                examples.append(_example(kept, place))
            feature = self._keep({**row, "index": found.get("feature_index")}, FeatureRow, {}, "features", place)
            self.add(source, feature, [], examples, place)

    def add(
        self,
        source: str,
        row: FeatureRow,
        explanations: list[ImportedExplanation],
        examples: list[Example],
        place: str,
    ) -> None:
        """One feature whole."""
        layer = layer_of(source)
        if layer is None:
            raise BankError(f"the source {source!r} names no layer, as 20-gemmascope-res-16k does", file=place)
        key = f"L{layer}/{row.index}"
        if key in self.features:
            raise BankError(
                f"feature {row.index} of layer {layer} comes twice; a collection tells features apart by layer and "
                "index alone, so import one source of a layer",
                file=place,
                field="index",
            )
        peaks = [max(example.activations) for example in examples]
        try:
            self.features[key] = ImportedFeature(
                id=key,
                layer=layer,
                index=row.index,
                hook_name=row.hookName,
                explanations=explanations,
                density=row.frac_nonzero,
                max_activation=max(peaks, default=None) if row.maxActApprox is None else row.maxActApprox,
                histogram=_histogram(row.freq_hist_data_bar_values, row.freq_hist_data_bar_heights),
                logit_histogram=_histogram(row.logits_hist_data_bar_values, row.logits_hist_data_bar_heights),
                promoted_tokens=row.pos_str,
                promoted_logits=row.pos_values,
                suppressed_tokens=row.neg_str,
                suppressed_logits=row.neg_values,
                examples=examples,
                vector=row.vector,
            )
        except ValidationError as e:
            raise malformed(e, place) from e

    def _rows(self, folder: Path, name: str, kind: type[R], columns: Mapping[str, Any]) -> Iterator[tuple[str, R]]:
        seen: set[int] = set()
        for path in _batches(folder / name):
            self.files.append(path)
            for place, row in read_lines(path):
                for field, expected in (("layer", folder.name), ("modelId", None)):
                    found = row.get(field)
                    if not isinstance(found, str) or (expected is not None and found != expected):
                        raise BankError(f"{found!r} is not that of the folder, {expected!r}", file=place, field=field)
                self.models.add(row["modelId"])
                kept = self._keep(row, kind, columns, name, place)
                if kind is FeatureRow and kept.index in seen:
                    raise BankError(f"feature {kept.index} comes twice", file=place, field="index")
                seen.add(kept.index)
                yield place, kept

    def _keep(self, row: Mapping[str, Any], kind: type[R], columns: Mapping[str, Any], table: str, place: str) -> R:
        for field, value in row.items():
            if field not in kind.model_fields and field not in _TOKEN_COLUMNS | _NAMING:
                self.dropped[table, field] += value not in (None, "", [], 0, columns.get(field))
        given = {name: row[name] for name in kind.model_fields if row.get(name) is not None}
        index = given.get("index")
        if isinstance(index, str) and index.isascii() and index.isdigit():
            given["index"] = int(index)
        try:
            return kind.model_validate(given)
        except ValidationError as e:
            raise malformed(e, place) from e


def read_neuronpedia(folder: Path) -> Collection:
    """Read a source, a model or a whole export of Neuronpedia, or a folder of SAEDashboard's `batch-N.json`.

    Features are those with a row, an explanation or an activation, in the order of layer and index.

    Raises BankError naming the file, line and column that are malformed, if the folder holds no such layout or
    features of several models, or if two sources lie in one layer.
    """
    reader = _Reader()
    sources = _sources(folder)
    for source in sources:
        reader.source(source)
    if not sources:
        for path in sorted(folder.glob("batch-*.json"), key=_number):
            reader.batch(path)
    if not reader.features:
        raise BankError(
            "holds no export of Neuronpedia: neither SOURCE/features or SOURCE/explanations with batch-N.jsonl.gz, nor "
            "batch-N.json of SAEDashboard",
            file=str(folder),
        )
    if len(reader.models) > 1:
        raise BankError(
            f"holds features of several models: {', '.join(sorted(reader.models))}; import one of them",
            file=str(folder),
            field="modelId",
        )
    (model,) = reader.models
    return Collection(
        name=folder.resolve().name,
        source="neuronpedia",
        files=tuple(_digest(path, folder) for path in reader.files),
        features=tuple(sorted(reader.features.values(), key=lambda f: (f.layer, f.index))),
        losses=tuple(_losses(reader, sources)),
        model=model,
    )


def _losses(reader: _Reader, sources: Iterable[Path]) -> Iterator[Loss]:
    for (table, field), count in sorted(reader.dropped.items()):
        if count:
            name = "explanations" if table.startswith("explanations") else table
            yield Loss(field=f"{name}.{field}", count=count, reason=_REASONS.get(field, _NO_PLACE))
    described = [path for source in sources for path in sorted(source.glob("*.jsonl"))]
    for name in sorted({path.name for path in described}):
        count = sum(path.name == name for path in described)
        yield Loss(field=name, count=count, reason="of what describes a source, only its id and model's id are kept")


def _sources(folder: Path) -> list[Path]:
    """The source folders at or below `folder`: those with rows of their own."""
    if not folder.is_dir():
        raise BankError("is no folder", file=str(folder))

    def is_source(path: Path) -> bool:
        return any(_batches(p) for p in path.iterdir() if p.is_dir() and _is_table(p.name))

    for pattern in (".", "*", "*/*", "*/*/*"):
        candidates = [folder.resolve()] if pattern == "." else sorted(p for p in folder.glob(pattern) if p.is_dir())
        found = [path for path in candidates if is_source(path)]
        if found:
            return found
    return []


def _is_table(name: str) -> bool:
    return name in ("features", "activations") or name.startswith("explanations")


def _batches(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz"))), key=_number)


def _number(path: Path) -> tuple[int, str]:
    """batch-10 comes after batch-9."""
    digits = path.name.removeprefix("batch-").split(".")[0]
    return int(digits) if digits.isascii() and digits.isdigit() else 0, path.name


def _digest(path: Path, folder: Path) -> SourceFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(name=path.resolve().relative_to(folder.resolve()).as_posix(), sha256=digest)


def _renamed(activation: Any) -> dict[str, Any]:
    """An activation of SAEDashboard under the names of the export."""
    names = {"bin_min": "binMin", "bin_max": "binMax", "bin_contains": "binContains"}
    found: dict[str, Any] = activation if isinstance(activation, dict) else {}
    return {"index": 0, **{names.get(name, name): value for name, value in found.items()}}


def _example(row: ActivationRow, place: str) -> Example:
    try:
        return Example(
            tokens=row.tokens,
            activations=row.values,
            bin_min=row.binMin,
            bin_max=row.binMax,
            bin_contains=row.binContains,
        )
    except ValidationError as e:
        raise malformed(e, place) from e


def _histogram(values: list[float], heights: list[float]) -> Histogram | None:
    return Histogram(values=values, heights=heights) if values or heights else None

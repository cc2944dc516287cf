"""Neuronpedia's export layout: folders, names, the columns of its rows, and reading and writing its JSON lines.

    MODEL/SOURCE/features/batch-0.jsonl.gz      one row a feature ("Neuron"), 1,024 a file
    MODEL/SOURCE/activations/batch-0.jsonl.gz   one row a text on which a feature fires ("Activation")
    MODEL/SOURCE/explanations/batch-0.jsonl.gz  one row an explanation; also `explanations-.../`
    MODEL/SOURCE/{model,release,sourceset,source}.jsonl
    config/explanation_type.jsonl               what the ways of explaining are called

A source is one SAE: `LAYER-SET`, such as `20-gemmascope-res-16k`, with `__` before anything more that tells it apart.
The columns are those that Neuronpedia's own export script selects; its importer takes the columns of a file's first row
for all of them, so every row here has the same ones.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from feature_bank.errors import BankError

__all__ = [
    "ACTIVATION_COLUMNS",
    "BATCH",
    "EXPLANATION_COLUMNS",
    "FEATURE_COLUMNS",
    "KIND_PREFIX",
    "identifier",
    "layer_of",
    "read_lines",
    "slug",
    "write_lines",
]

BATCH = 1024
KIND_PREFIX = "sailguard_"
"""Before the method of our explanations, in the column `typeName`."""

_LISTS = (
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "neuron_alignment_indices",
    "neuron_alignment_l1",
    "neuron_alignment_values",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "decoder_weights_dist",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "topkCosSimIndices",
    "topkCosSimValues",
    "vector",
)
FEATURE_COLUMNS: Mapping[str, Any] = {
    "modelId": "",
    "layer": "",
    "index": "",
    "maxActApprox": 0,
    "creatorId": None,
    "frac_nonzero": 0,
    **{name: [] for name in _LISTS},
    "sourceSetName": None,
    "vectorLabel": None,
    "hookName": None,
    "vectorDefaultSteerStrength": 10,
    "hasVector": False,
}
"""The columns of a row of `features`, with what stands there if nothing is known."""

ACTIVATION_COLUMNS: Mapping[str, Any] = {
    "id": "",
    "modelId": "",
    "layer": "",
    "index": "",
    "creatorId": "",
    "dataSource": None,
    "tokens": [],
    "maxValue": 0,
    "minValue": 0,
    "values": [],
    "maxValueTokenIndex": 0,
    "dfaValues": [],
    "dfaMaxValue": None,
    "dfaTargetIndex": None,
    "binContains": None,
    "binMin": None,
    "binMax": None,
}

EXPLANATION_COLUMNS: Mapping[str, Any] = {
    "id": "",
    "modelId": "",
    "layer": "",
    "index": "",
    "authorId": "",
    "description": "",
    "embedding": None,
    "typeName": None,
    "explanationModelName": None,
    "umap_x": 0,
    "umap_y": 0,
    "umap_cluster": 0,
    "umap_log_feature_sparsity": 0,
}


def slug(name: str) -> str:
    """`name` as an id may read: lower case, letters, digits, dashes, underscores (dots become dashes)."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-") or "unnamed"


def identifier(*parts: object) -> str:
    """A row's id in the form of Neuronpedia's (25 characters, c first), decided by `parts` alone."""
    return "c" + hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]


def layer_of(source: str) -> int | None:
    """The layer that a source's id begins with; None if it begins with none (embeddings: `e-...`)."""
    found = re.match(r"(\d+)(?:-|$)", source)
    return None if found is None else int(found[1])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, gzipped if the name says so; the same rows give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every line, the place being FILE:LINE. Raises BankError naming it for what is no JSON object."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _row(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as e:
        raise BankError(f"cannot be read, perhaps half-written: {e}", file=str(path)) from e


def _row(line: bytes, place: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        row = json.loads(line, parse_constant=refuse)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell text that no file can be written with
    except (ValueError, RecursionError) as e:
        raise BankError(f"is not valid JSON: {e}", file=place) from e
    if not isinstance(row, dict):
        raise BankError("must hold a JSON object", file=place)
    return row

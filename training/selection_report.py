"""A written selection: `selection.json` with all figures, `selection.csv` with a line a concept and SAE, and a plot.

The folder holds the pairs' activations too, so the files are written one by one, the JSON last.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError
from training.ranking import Choice, Ranked
from training.selection import Contrast, Curve, Measured
from training.selection_plots import save_selection

SCHEMA_VERSION = 1
STEM = "selection"
ACTIVATIONS = "activations"
FIGURES = ("i_cdf", "net", "separation")
MEANINGS: Mapping[str, str] = {
    "i_cdf": "mean over all features of f_j, the share of the pairs where the feature fires on the text with the "
    "concept and not on its twin",
    "net": "mean over all features of max(0, f_j - r_j), r_j being f_j with the sides exchanged",
    "separation": "mean of the largest max(0, f_j - r_j); its margin over the null, mean over domains, is ranked by",
    "curve": "L0_t, the number of features with f_j >= t, at t = 1/pairs, 2/pairs, ..., 1",
    "null": "the same figure when every pair is turned round with probability 1/2: mean, 2.5th and 97.5th percentile",
}


def check_selection_folder(folder: Path) -> None:
    """Raise DataError if `folder` is a file, or holds something that is no selection."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file; name a folder for the selection")
    known = (folder / f"{STEM}.json").is_file() or (folder / ACTIVATIONS).is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise DataError(f"{folder}: holds something else than a selection; name a new folder")


def selection_record(ranked: Sequence[Ranked], choice: Choice, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """All of a selection, JSON-ready: provenance, the SAEs best first, the choice and its reasons."""
    return {
        "schema_version": SCHEMA_VERSION,
        **provenance,
        "meanings": dict(MEANINGS),
        "choice": {
            "overall": choice.overall,
            "by_hook_point": dict(choice.by_hook_point),
            "why": list(choice.why),
        },
        "saes": [_sae(entry, place) for place, entry in enumerate(ranked, 1)],
    }


def write_selection(
    folder: Path, ranked: Sequence[Ranked], choice: Choice, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the selection's files to `folder`, and return what `selection.json` holds.

    Raises MissingExtraError without matplotlib.
    """
    record = selection_record(ranked, choice, provenance)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{STEM}-", dir=folder) as tmp:
        save_selection(ranked, Path(tmp) / STEM)
        (Path(tmp) / f"{STEM}.csv").write_text(_table(ranked), encoding="utf-8")
        (Path(tmp) / f"{STEM}.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
        for kind in ("png", "svg", "csv", "json"):
            name = f"{STEM}.{kind}"
            with atomic_file(folder / name) as target:
                target.write_bytes((Path(tmp) / name).read_bytes())
    return record


def _sae(entry: Ranked, place: int) -> dict[str, Any]:
    candidate = entry.candidate
    return {
        "name": candidate.name,
        "rank": place,
        "hook_name": candidate.hook_name,
        "d_in": candidate.d_in,
        "d_sae": candidate.d_sae,
        "l0": round(entry.l0, 4),
        "alive": entry.alive,
        "separation": _round(entry.separation),
        "separation_error": None if entry.error is None else _round(entry.error),
        "i_cdf": _round(entry.mean("i_cdf", margin=False)),
        "i_cdf_margin": _round(entry.mean("i_cdf")),
        "net_margin": _round(entry.mean("net")),
        "concept_separation": _round(entry.mean_over_concepts("separation")),
        **candidate.about,
        "domains": {
            name: {
                **_contrast(domain),
                "concepts": {concept: _contrast(own) for concept, own in domain.concepts.items()},
            }
            for name, domain in entry.domains.items()
        },
    }


def _contrast(found: Contrast) -> dict[str, Any]:
    figures = {name: _measured(getattr(found, name)) for name in FIGURES}
    about = {"pairs": found.pairs, "best_frequency": _round(found.best_frequency)}
    return {**about, **figures, "curve": _curve(found.curve)}


def _measured(figure: Measured) -> dict[str, float]:
    names = ("value", "null", "null_low", "null_high", "margin")
    return {name: _round(getattr(figure, name)) for name in names}


def _curve(curve: Curve) -> dict[str, list[float]]:
    return {
        "l0": [int(v) for v in curve.l0],
        **{name: [round(float(v), 2) for v in getattr(curve, name)] for name in ("null", "null_low", "null_high")},
    }


def _table(ranked: Sequence[Ranked]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [f"{name}{suffix}" for name in FIGURES for suffix in ("", "_null", "_null_low", "_null_high", "_margin")]
    writer.writerow(["rank", "name", "hook_name", "l0", "domain", "concept", "pairs", "best_frequency", *figures])
    for place, entry in enumerate(ranked, 1):
        about = [place, entry.name, entry.candidate.hook_name, round(entry.l0, 4)]
        for domain, concept, found in _parts(entry):
            values = [value for name in FIGURES for value in _measured(getattr(found, name)).values()]
            writer.writerow([*about, domain, concept, found.pairs, _round(found.best_frequency), *values])
    return text.getvalue()


def _parts(entry: Ranked) -> Iterator[tuple[str, str, Contrast]]:
    """(domain, concept, figures); the domain as a whole has no concept."""
    for name, domain in entry.domains.items():
        yield name, "", domain
        for concept, found in domain.concepts.items():
            yield name, concept, found


def _round(value: float) -> float:
    return round(value, 6)

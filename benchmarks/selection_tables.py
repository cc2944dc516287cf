"""What docs/selection.md shows of the selection benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.results import Result
from benchmarks.selection import METRICS
from benchmarks.tables import markdown
from feature_bank.taxonomy import DOMAINS

_PARTS = {"held_out": "held-out rows", "dev": "development rows"}


def selection_tables(result: Result) -> str:
    """The SAEs, the correlations with detection, and what each figure would have picked."""
    detail = result.detail
    where = (
        f"{result.date}, {result.machine.cores} cores. {len(detail['saes'])} BatchTopK SAEs of {detail['model']} on "
        f"{detail['tokens']:,} tokens, heads of {detail['features']} features, {detail['dev_rows']:,} development rows."
    )
    parts = [where]
    if detail["limit"] is not None:
        parts.append(f"**A trial on {detail['limit']} rows of each part; the figures mean nothing.**")
    parts += ["### The SAEs, ranked", _saes(detail), "### Rank correlation with detection", _correlations(detail)]
    parts += [_ceiling(result), "### By domain (separation above its null)", _domains(detail)]
    parts += ["### What each figure would have picked", _picks(result)]
    return "\n\n".join(parts)


def _saes(detail: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`{sae['name']}`",
            f"{sae['l0']:.0f}",
            f"{sae['fvu']:.3f}",
            f"{sae['separation']:.4f}",
            f"{sae['i_cdf']:.4f}",
            f"{sae['i_cdf_margin']:+.4f}",
            *(f"{sae[f'auroc_{part}']:.4f}" for part in _PARTS),
        ]
        for sae in detail["saes"]
    ]
    heading = ["SAE", "L0", "FVU", "separation", "I_CDF", "above its null"]
    return markdown([*heading, *(f"AUROC, {title}" for title in _PARTS.values())], rows)


def _correlations(detail: Mapping[str, Any]) -> str:
    rows = []
    for metric, title in METRICS.items():
        cells: list[object] = [title]
        for part in _PARTS:
            found = detail["correlations"][metric][part]["mean"]
            cells += [_rho(found), f"{found['p']:.3f}", f"{found['within']['rho']:+.2f}"]
        rows.append(cells)
    names = [f"{title}: {name}" for title in _PARTS.values() for name in ("Spearman (95 %)", "p", "within layers")]
    return markdown(["figure", *names], rows)


def _ceiling(result: Result) -> str:
    found = result.detail["parts"]
    return (
        f"Detection on the held-out and on the development rows agree with each other at {_rho(found)}: a figure can "
        "hardly agree better with either."
    )


def _domains(detail: Mapping[str, Any]) -> str:
    correlations = detail["correlations"]["separation"]
    rows = [
        [
            domain,
            *(cell for part in _PARTS for cell in (_rho(correlations[part][domain]), _p(correlations[part][domain]))),
        ]
        for domain in DOMAINS
        if domain in correlations["dev"]
    ]
    names = [f"{title}: {name}" for title in _PARTS.values() for name in ("Spearman (95 %)", "p")]
    return markdown(["domain", *names], rows)


def _picks(result: Result) -> str:
    rows: list[list[object]] = []
    for metric, title in METRICS.items():
        picks = result.detail["picks"][metric]
        rows.append([title, f"`{picks['dev']['sae']}`", *(f"{picks[part]['auroc']:.4f}" for part in _PARTS)])
    for name, title in (("best", "the best in hindsight"), ("mean", "any of them, on average")):
        values = [result.value(f"{name}_auroc_{part}") for part in _PARTS]
        rows.append([title, None, *(None if v is None else f"{v:.4f}" for v in values)])
    return markdown(["figure", "its pick", *(f"AUROC, {title}" for title in _PARTS.values())], rows)


def _rho(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['rho']:+.2f} ({low:+.2f} to {high:+.2f})"


def _p(found: Mapping[str, Any]) -> str:
    return f"{found['p']:.3f}"

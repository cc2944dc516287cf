"""A written report of one SAE or a sweep: `report.html`, plots as PNG and SVG, `report.json` and the densities.

The page is one file that asks for nothing from anywhere, and what it quotes is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from feature_bank.atomic import atomic_folder
from feature_bank.errors import DataError
from training.downstream import SaeQuality
from training.plots import Point, save_densities, save_tradeoff

SCHEMA_VERSION = 1
HTML_FILE, JSON_FILE, DENSITY_FILE = "report.html", "report.json", "feature_density.safetensors"

_MEANINGS: Mapping[str, str] = {
    "l0": "active features a token, mean",
    "fvu": "fraction of variance unexplained; 0 is perfect",
    "explained_variance": "1 - fvu",
    "explained_variance_legacy": "mean of each token's own explained variance, SAEBench's older definition",
    "mse": "squared length of the residual, mean",
    "cossim": "cosine of activation and reconstruction, mean",
    "l1": "sum of a token's feature activations, mean",
    "l2_norm_in": "length of the activation, mean",
    "l2_norm_out": "length of the reconstruction, mean",
    "l2_ratio": "length of the reconstruction over that of the activation, mean; below 1 is shrinkage",
    "relative_reconstruction_bias": "1 is unbiased; below 1 is shrinkage",
    "frac_alive": "share of features active on at least one of the tokens",
    "dead_fraction": "1 - frac_alive",
    "freq_over_1_percent": "share of features active on more than 1 % of the tokens",
    "freq_over_10_percent": "share of features active on more than 10 % of the tokens",
    "ce_loss_recovered": "share of the ablation's cross-entropy that the reconstruction saves; 1 is perfect "
    "(SAEBench: ce_loss_score)",
    "ce_loss_without_sae": "cross-entropy of the model as it is, nats a token",
    "ce_loss_with_sae": "with the reconstruction in place of the activation",
    "ce_loss_with_ablation": "with the ablation in its place",
    "kl_div_score": "share of the ablation's divergence that the reconstruction saves; 1 is perfect",
    "kl_div_with_sae": "KL(model || model with the reconstruction), nats a token",
    "kl_div_with_ablation": "KL(model || model with the ablation)",
    "tokens": "tokens that the figures of reconstruction rest on",
    "outlier_tokens": "attention sinks, left out",
    "ce_tokens": "tokens that the cross-entropies rest on",
    "kl_tokens": "tokens that the divergences rest on",
}
_COLUMNS = ("l0", "fvu", "ce_loss_recovered", "kl_div_with_sae", "cossim", "l2_ratio", "dead_fraction")
_TRADEOFFS = {
    "fvu": ("l0_fvu", "Sparsity against reconstruction", "FVU: variance unexplained [fraction]"),
    "ce_loss_recovered": (
        "l0_ce_loss_recovered",
        "Sparsity against what the model loses",
        "cross-entropy loss recovered [fraction]",
    ),
}
_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
th{font-weight:600;border-bottom-color:#888}td.n,th.n{text-align:right;white-space:nowrap}
td.name{overflow-wrap:anywhere;min-width:14rem}tr.front td.name{font-weight:600}
img{max-width:100%;height:auto;display:block}figure{margin:1rem 0}figcaption,.note{color:#555;font-size:.87rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0}dt{color:#555}dd{margin:0}
dd{overflow-wrap:anywhere}
"""


@dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """An SAE in a report."""

    quality: SaeQuality
    series: str = "SAE"
    """What it is compared by in plots, such as its architecture."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, cost) whether no other point is at most as large in both and smaller in one."""
    return [
        not any(a <= x and b <= y and (a < x or b < y) for a, b in points)  # points that are equal share their place
        for x, y in points
    ]


def write_report(
    folder: Path, entries: Sequence[ReportEntry], *, title: str, provenance: Mapping[str, str] | None = None
) -> Path:
    """Write the report atomically and return the path of its page. An earlier report in `folder` is replaced.

    provenance: what else the reader should know, such as the model and the files of text, by name.

    Raises DataError for no entry, two of one name, or a folder that holds something else; MissingExtraError without
    matplotlib.
    """
    check_report_folder(folder)
    names = [entry.quality.name for entry in entries]
    if not names:
        raise DataError("there is no SAE to report on; name at least one")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two SAEs of the report are named {repeated[0]!r}; give each a name of its own")
    fronts = {figure: _front(entries, figure) for figure in _TRADEOFFS}
    with atomic_folder(folder) as tmp:
        plots = _plot(entries, fronts, tmp)
        record = {
            "schema_version": SCHEMA_VERSION,
            "title": title,
            "provenance": dict(provenance or {}),
            "saes": [
                {
                    **entry.quality.to_dict(),
                    "series": entry.series,
                    "pareto": [figure for figure, front in fronts.items() if entry.quality.name in front],
                }
                for entry in entries
            ],
        }
        (tmp / JSON_FILE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        save_file(
            {entry.quality.name: entry.quality.reconstruction.feature_density for entry in entries}, tmp / DENSITY_FILE
        )
        (tmp / HTML_FILE).write_text(_page(record, plots), encoding="utf-8")
    return folder / HTML_FILE


def check_report_folder(folder: Path) -> None:
    """Raise DataError if `folder` holds something that is no report, which must not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file; name a folder for the report")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JSON_FILE).is_file():
        raise DataError(f"{folder}: holds something else than a report; name a new folder")


def _panel(quality: SaeQuality) -> str:
    return quality.hook_name if quality.hook_name_out is None else f"{quality.hook_name}\n-> {quality.hook_name_out}"


def _figure_of(quality: SaeQuality, figure: str) -> float | None:
    value: float | None = quality.to_dict().get(figure)
    return value


def _front(entries: Sequence[ReportEntry], figure: str) -> set[str]:
    """Names of the SAEs that no other of their hook point beats in both L0 and the figure; empty for a single one."""
    found: set[str] = set()
    sign = 1.0 if figure == "fvu" else -1.0
    for panel in {_panel(entry.quality) for entry in entries}:
        here = {
            entry.quality.name: (entry.quality.reconstruction.l0, sign * value)
            for entry in entries
            if _panel(entry.quality) == panel and (value := _figure_of(entry.quality, figure)) is not None
        }
        if len(here) > 1:
            front = pareto_front(list(here.values()))
            found |= {name for name, on_front in zip(here, front, strict=True) if on_front}
    return found


def _plot(entries: Sequence[ReportEntry], fronts: Mapping[str, set[str]], folder: Path) -> list[tuple[str, str, str]]:
    """Draw into `folder`; (heading, caption, SVG as a data URI) of each plot."""
    plots = []
    for figure, (stem, heading, label) in _TRADEOFFS.items():
        points = [
            Point(
                panel=_panel(entry.quality),
                series=entry.series,
                l0=entry.quality.reconstruction.l0,
                value=value,
                on_front=entry.quality.name in fronts[figure],
            )
            for entry in entries
            if (value := _figure_of(entry.quality, figure)) is not None and entry.quality.reconstruction.l0 > 0
        ]
        panels = [point.panel for point in points]
        if len(panels) > len(set(panels)):  # else there is nothing to compare
            save_tradeoff(points, label, folder / stem)
            better = "Lower is better" if figure == "fvu" else "Higher is better"
            caption = f"{better}, as is further left. SAEs of one hook point are compared; the front is theirs."
            plots.append((heading, caption, _data_uri(folder / f"{stem}.svg")))
    tokens = {entry.quality.reconstruction.tokens for entry in entries}
    histograms = {entry.quality.name: entry.quality.reconstruction.density_histogram for entry in entries}
    save_densities(histograms, tokens.pop() if len(tokens) == 1 else None, folder / "feature_density")
    caption = (
        "Features by how often they are active, in quarter decades. On the far left those that never were on this "
        "text; more text would wake some of them."
    )
    plots.append(("Feature density", caption, _data_uri(folder / "feature_density.svg")))
    return plots


def _data_uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _page(record: Mapping[str, Any], plots: Sequence[tuple[str, str, str]]) -> str:
    saes = record["saes"]
    figures = _single(saes[0]) if len(saes) == 1 else _table(saes)
    shown = "".join(
        f"<h2>{escape(heading)}</h2><figure><img alt='{escape(heading)}' src='{uri}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for heading, caption, uri in plots
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>\n"
        # The browser itself is told to fetch nothing
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(record['title'])}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(record['title'])}</h1>\n{_about(record)}\n<h2>Figures</h2>\n{figures}\n{shown}"
        f"<p class='note'>All figures: {JSON_FILE}; the density of each feature: {DENSITY_FILE}.</p>\n</body></html>\n"
    )


def _about(record: Mapping[str, Any]) -> str:
    about = dict(record["provenance"])
    first = record["saes"][0]
    if "ablation" in first:
        where = "the text's own tokens" if first["splice_at"] == "content" else "all positions but padding"
        what = "zeros" if first["ablation"] == "zero" else "the mean activation"
        about["splicing"] = f"at {where}; ablation with {what} at the same positions"
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items())
    return f"<dl>{rows}</dl>"


def _single(sae: Mapping[str, Any]) -> str:
    facts = ("name", "series", "hook_name", "hook_name_out", "d_in", "d_sae")
    rows = [(name, str(sae[name]), "") for name in facts if sae[name] is not None]
    rows += [(name, _number(sae[name]), meaning) for name, meaning in _MEANINGS.items() if name in sae]
    body = "".join(
        f"<tr><td>{escape(name)}</td><td class='{'n' if meaning else 'name'}'>{escape(value)}</td>"
        f"<td class='note'>{escape(meaning)}</td></tr>\n"
        for name, value, meaning in rows
    )
    return f"<div class='wide'><table>{body}</table></div>"


def _table(saes: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in _COLUMNS if any(name in sae for sae in saes)]
    head = "".join(f"<th class='n'>{escape(name)}</th>" for name in ("d_sae", *columns))
    body = ""
    for sae in saes:
        marks = " ".join("†" if figure == "fvu" else "‡" for figure in sae["pareto"])
        cells = "".join(f"<td class='n'>{_number(sae.get(name))}</td>" for name in ("d_sae", *columns))
        output = f" → {sae['hook_name_out']}" if sae["hook_name_out"] else ""
        body += (
            f"<tr{' class=front' if marks else ''}><td class='name'>{escape(sae['name'])} {marks}</td>"
            f"<td>{escape(sae['series'])}</td><td>{escape(sae['hook_name'] + output)}</td>{cells}</tr>\n"
        )
    notes = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_MEANINGS[name])}</dd>" for name in columns)
    return (
        f"<div class='wide'><table><thead><tr><th>name</th><th>series</th><th>hook point</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>\n"
        "<p class='note'>† on the Pareto front of L0 and FVU at its hook point; ‡ on that of L0 and cross-entropy "
        "recovered.</p>"
        f"<dl class='note'>{notes}</dl>"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"

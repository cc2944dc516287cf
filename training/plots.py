"""Plots of what SAEs are worth, for a written report. They need matplotlib, which the extra `train` installs.

`training.plot_style` says how they look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.plot_style import (
    COLOURS,
    add_legend,
    new_figure,
    plain_name,
    plot_settings,
    save_figure,
    series_style,
    set_text,
)
from training.quality import DENSITY_EDGES, DensityHistogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LINES = 5  # more histograms than these are drawn as rows of a heat map
_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One SAE among others: how sparse it is, and a figure of how good."""

    panel: str
    """Only SAEs of one hook point can be compared; each has a panel, under this heading of a line or two."""
    series: str
    l0: float
    value: float
    on_front: bool
    """Whether no other SAE of its panel is at least as sparse and as good, and better in one."""


def save_tradeoff(points: Sequence[Point], label: str, stem: Path) -> None:
    """Plot a figure of merit against L0, a panel for each hook point, to `stem`.png and `stem`.svg."""
    with plot_settings():
        save_figure(_tradeoff(points, label), stem)


def save_densities(histograms: Mapping[str, DensityHistogram], tokens: int | None, stem: Path) -> None:
    """Plot how many features fire how often to `stem`.png and `stem`.svg.

    tokens: what each SAE was measured on, if that is the same for all.
    """
    with plot_settings():
        draw = _density_lines if len(histograms) <= MAX_LINES else _density_rows
        save_figure(draw(histograms, tokens), stem)


def _tradeoff(points: Sequence[Point], label: str) -> Figure:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = list(dict.fromkeys(point.panel for point in points))
    series = list(dict.fromkeys(point.series for point in points))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    legend_lines = -(-(len(series) + 1) // (2 * columns))
    figure = new_figure(max(4.8, 3.2 * columns), 2.9 * rows + 0.22 * legend_lines + 0.1)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_axis_off()
            continue
        here = [point for point in points if point.panel == panels[number]]
        front = sorted((point.l0, point.value) for point in here if point.on_front)
        if len(front) > 1:
            (handles["Pareto front"],) = axes.plot(  # in steps: between two SAEs there is none
                *zip(*front, strict=True), drawstyle="steps-post", color="#777777", lw=1.2, ls="--", zorder=1
            )
        for index, name in enumerate(series):
            own = [point for point in here if point.series == name]
            if own:
                (handles[f"series {name}"],) = axes.plot(
                    [point.l0 for point in own],
                    [point.value for point in own],
                    ls="none",
                    ms=6,
                    mec="white",
                    mew=0.6,
                    **series_style(index),
                )
        set_text(axes.set_title(" "), "\n".join(map(plain_name, panels[number].splitlines())))
        axes.set_xscale("log")
        axes.tick_params(labelbottom=number + columns >= len(panels))
        if number + columns >= len(panels):
            axes.set_xlabel("L0: active features a token")
        if number % columns == 0:
            axes.set_ylabel(label)
    low, high = min(point.l0 for point in points), max(point.l0 for point in points)
    narrow = math.log10(high / low) < 1.2  # a decade has too few ticks of its own
    for axes in grid.flat:
        axes.set_xlim(low / 1.25, high * 1.25)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if narrow else (1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    named = [name for name in (f"series {s}" for s in series) if name in handles]
    named += ["Pareto front"] if "Pareto front" in handles else []
    add_legend(
        figure,
        [handles[name] for name in named],
        [name.removeprefix("series ") for name in named],
        loc="outside lower center",
        ncols=min(len(named), 2 * columns),
    )
    return figure


def _range(histograms: Mapping[str, DensityHistogram]) -> int:
    """The first bin to show, so that empty ones on the left take no room; two decades at least."""
    filled = [i for h in histograms.values() for i, n in enumerate(h.counts) if n]
    return max(0, min([*filled, len(DENSITY_EDGES) - 1 - 8]) - 1)


def _shares(histogram: DensityHistogram) -> tuple[Any, float]:
    """Per cent of the features in each bin, and of those that never fired."""
    total = sum(histogram.counts) + histogram.dead
    return np.array(histogram.counts) * 100 / total, histogram.dead * 100 / total


def _density_lines(histograms: Mapping[str, DensityHistogram], tokens: int | None) -> Figure:
    first = _range(histograms)
    edges = 10.0 ** np.array(DENSITY_EDGES[first:])
    figure = new_figure(6.4, 3.3 + (0.2 * len(histograms) if len(histograms) > 1 else 0))
    dead, alive = figure.subplots(1, 2, sharey=True, width_ratios=(1, 11))
    handles = []
    for index, histogram in enumerate(histograms.values()):
        shares, never = _shares(histogram)
        colour = COLOURS[index % len(COLOURS)]
        filled = len(histograms) == 1
        width = 0.8 / len(histograms)
        dead.bar(-0.4 + width * (index + 0.5), never, width, color=colour)
        handles.append(
            alive.stairs(
                shares[first:],
                edges,
                color=colour,
                fill=filled,
                lw=1.6,
                ls=("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))[index % 5],
            )
        )
    dead.set_xticks([0], ["never"])
    dead.set_xlim(-0.6, 0.6)
    dead.grid(axis="x", visible=False)
    dead.set_ylabel("features [% of all]")
    dead.set_ylim(bottom=0)
    alive.set_xscale("log")
    alive.set_xlim(edges[0], 1.0)
    alive.set_xlabel("feature density: share of tokens on which a feature is active")
    alive.tick_params(axis="y", left=False, labelleft=False)
    if tokens is not None and 1 / tokens > edges[0]:
        alive.axvline(1 / tokens, color="#777777", lw=1, ls=":")
        alive.annotate(
            f" 1 of {tokens:,} tokens",
            (1 / tokens, 1.0),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=7,
            color="#555555",
        )
    if len(histograms) > 1:
        add_legend(figure, handles, list(histograms), loc="outside lower center", ncols=1)
    return figure


def _density_rows(histograms: Mapping[str, DensityHistogram], tokens: int | None) -> Figure:
    first = _range(histograms)
    edges = 10.0 ** np.array(DENSITY_EDGES[first:])
    shares = [_shares(histogram) for histogram in histograms.values()]
    alive_shares = np.array([share[first:] for share, _ in shares])
    dead_shares = np.array([[never] for _, never in shares])
    height = min(40.0, 1.1 + 0.2 * len(histograms))
    figure = new_figure(8.4, height)
    dead, alive = figure.subplots(1, 2, sharey=True, width_ratios=(1, 16))
    rows = np.arange(len(histograms) + 1) - 0.5
    scale = {"vmin": 0.0, "vmax": max(1.0, float(alive_shares.max()), float(dead_shares.max())), "cmap": "Blues"}
    dead.pcolormesh(np.array([-0.5, 0.5]), rows, dead_shares, **scale)
    mesh = alive.pcolormesh(edges, rows, alive_shares, **scale)
    dead.set_xticks([0], ["never"])
    dead.set_yticks(range(len(histograms)), [plain_name(name, 56) for name in histograms], parse_math=False)
    dead.invert_yaxis()
    alive.set_xscale("log")
    alive.set_xlabel("feature density: share of tokens on which a feature is active")
    if tokens is not None and 1 / tokens > edges[0]:
        alive.axvline(1 / tokens, color="#777777", lw=1, ls=":")
    for axes in (dead, alive):
        axes.grid(visible=False)
        axes.tick_params(axis="y", left=False)
    alive.tick_params(axis="y", labelleft=False)
    figure.colorbar(
        mesh, ax=[dead, alive], label="features [% of all]", pad=0.015, shrink=min(1.0, 3 / height), anchor=(0, 1)
    )
    return figure

"""The plot of a selection: how many features distinguish each domain's pairs, and figures by layer and sparsity."""

from __future__ import annotations

from collections.abc import Sequence
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
from training.ranking import Ranked, by_hook_point
from training.selection import DomainContrast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FLOOR = 0.7  # below one feature, which a log axis shows at its edge


def save_selection(ranked: Sequence[Ranked], stem: Path) -> None:
    """Draw a ranking to `stem`.png and `stem`.svg. Raises MissingExtraError without matplotlib.

    Above, a panel a domain: L0_t of the best SAE of each hook point (at most seven) with the 95 % band of its null.
    Below, against L0 and a line a hook point: I_CDF with its null, and what is ranked by.
    """
    with plot_settings():
        save_figure(_figure(ranked), stem)


def _figure(ranked: Sequence[Ranked]) -> Figure:
    hooks = by_hook_point(ranked)
    best = [hooks[hook][0] for hook in hooks][: len(COLOURS)]
    domains = list(ranked[0].domains)
    figure = new_figure(max(7.4, 3.1 * len(domains)), 6.6 + 0.2 * -(-len(hooks) // 3))
    rows: Any = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    above, below = rows
    panels = above.subplots(1, len(domains), sharex=True, sharey=True, squeeze=False)[0]
    reach = 0.0
    for number, (axes, domain) in enumerate(zip(panels, domains, strict=True)):
        for index, entry in enumerate(best):
            reach = max(reach, _curve(axes, entry.domains[domain], COLOURS[index]))
        axes.set_yscale("log")
        axes.set_ylim(bottom=_FLOOR)
        set_text(axes.set_title(" "), f"{domain}: {ranked[0].domains[domain].pairs} pairs")
        axes.set_xlabel("t: share of the pairs")
        if number == 0:
            axes.set_ylabel("L0_t: features with f >= t")
    panels[0].set_xlim(0, min(1.0, 1.08 * reach))
    handles = [axes.plot([], [], color=COLOURS[i], lw=1.5)[0] for i in range(len(best))]
    handles.append(axes.fill_between([], [], color="#777777", alpha=0.3, lw=0))
    names = [entry.name for entry in best] + ["95 % of pairs turned round"]
    add_legend(above, handles, names, loc="outside lower center", ncols=min(4, len(names)))

    left, right = below.subplots(1, 2, sharex=True)
    lines = [_line(left, right, entries, index) for index, entries in enumerate(hooks.values())]
    (null,) = left.plot([], [], color="#777777", ls="--", lw=1.3, marker="o", ms=5, mfc="none")
    add_legend(
        below, [*lines, null], [*hooks, "null of I_CDF"], loc="outside lower center", ncols=min(4, len(hooks) + 1)
    )
    _scale(left, [entry.l0 for entry in ranked])
    set_text(left.set_title(" "), "I_CDF, mean over domains")
    left.set_ylabel("mean distinguishing frequency")
    left.set_ylim(bottom=0)
    set_text(right.set_title(" "), "Separation above its null (ranked by this), mean over domains")
    right.set_ylabel("net frequency of the best features")
    right.axhline(0, color="#777777", lw=1, ls="--")
    winner = ranked[0]
    right.annotate(
        plain_name(winner.name, 40),
        (winner.l0, winner.separation),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        fontsize=7,
        parse_math=False,
    )
    right.margins(y=0.18)
    return figure


def _curve(axes: Any, found: DomainContrast, colour: str) -> float:
    """L0_t and the band of its null, as far as they are above zero; the largest t of that."""
    curve = found.curve
    n = max(1, int(np.count_nonzero(np.maximum(curve.l0, curve.null_high))))  # all of them fall with t
    at = np.arange(1, n + 1) / found.pairs
    low, high = (np.maximum(values[:n], _FLOOR / 2) for values in (curve.null_low, curve.null_high))
    axes.fill_between(at, low, high, step="pre", color=colour, alpha=0.22, lw=0)
    axes.step(at, np.where(curve.l0[:n] > 0, curve.l0[:n], np.nan), where="pre", color=colour, lw=1.5)
    return n / found.pairs


def _line(left: Any, right: Any, entries: Sequence[Ranked], index: int) -> Any:
    """One hook point in both panels."""
    ordered = sorted(entries, key=lambda r: r.l0)
    l0 = [r.l0 for r in ordered]
    style: dict[str, Any] = {**series_style(index), "ms": 5, "lw": 1.3, "mec": "white", "mew": 0.6}
    left.plot(l0, [r.mean("i_cdf", margin=False) for r in ordered], **style)
    nulls = [r.mean("i_cdf", margin=False) - r.mean("i_cdf") for r in ordered]
    left.plot(l0, nulls, **{**style, "mec": style["color"], "mew": 0.9}, mfc="none", ls="--")
    right.errorbar(
        l0, [r.separation for r in ordered], yerr=[r.error or 0.0 for r in ordered], elinewidth=0.8, capsize=2, **style
    )
    (handle,) = right.plot([], [], **style)
    return handle


def _scale(axes: Any, l0: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for shared in axes.figure.axes:
        shared.set_xlabel("L0: active features a token")
    positive = [value for value in l0 if value > 0]
    if not positive:
        return
    axes.set_xscale("log")
    axes.set_xlim(min(positive) / 1.25, max(positive) * 1.25)
    narrow = max(positive) < 16 * min(positive)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0) if narrow else (1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

"""Where the marks of a chart lie: plain numbers and SVG paths, in units of 0 to 100 from the left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["AUROC", "CORRELATION", "HEIGHT", "Axis", "Histogram", "Strip", "bars_path", "compare", "strip"]

HEIGHT = 40
"""Of a histogram, in the units of its width."""


class Axis(NamedTuple):
    """The range that a chart shows; what lies beyond stands at its ends."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """The distance from the left end, 0 to 100."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 1)


AUROC = Axis(0.25, 1.0)
CORRELATION = Axis(-0.25, 1.0)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A value with its interval and its null on a line, in whole pixels of 100."""

    at: int
    low: int | None
    width: int
    null: int | None
    zero: int
    """Where chance, or no effect, lies; the style sheet knows 20, 33 and 50."""


def strip(
    axis: Axis,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    null: float | None = None,
    zero: float = 0.0,
) -> Strip:
    """Place a value, and what is known of its interval and null, on an axis."""
    left = None if low is None or high is None else round(axis.place(low))
    return Strip(
        at=round(axis.place(value)),
        low=left,
        width=0 if left is None or high is None else round(axis.place(high)) - left,
        null=None if null is None else round(axis.place(null)),
        zero=round(axis.place(zero)),
    )


def bars_path(counts: Sequence[int], *, log: bool = False) -> str:
    """The outline of a histogram 100 wide and 40 high, as an SVG path; empty if there is nothing to draw.

    log: heights grow with the logarithm of the counts.
    """
    heights = [math.log1p(count) if log else float(count) for count in counts]
    top = max(heights, default=0.0)
    if not top:
        return ""
    width = f"{100 / len(heights):g}"
    steps = []
    for height in heights:
        # what is there at all is seen
        y = HEIGHT if height == 0 else min(HEIGHT - 1, round(HEIGHT * (1 - height / top)))
        steps.append(f"V{y}h{width}")
    return f"M0 {HEIGHT}{''.join(steps)}V{HEIGHT}z"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Values against those of their null."""

    title: str
    axis: Axis
    bars: str
    null_bars: str
    n: int
    median: float
    null_median: float | None
    median_at: float
    null_at: float | None
    above: int
    """Values whose interval lies above their own null."""
    ticks: tuple[tuple[float, str], ...]
    label: str = ""


def compare(
    title: str,
    values: Sequence[float],
    nulls: Sequence[float],
    *,
    axis: Axis,
    above: int,
    ticks: Sequence[float],
    label: str = "",
    bins: int = 40,
) -> Histogram:
    """Histograms of values and of nulls over one axis, each as high as the other: nulls lie close together."""
    null_median = float(np.median(nulls)) if nulls else None
    median = float(np.median(values))
    return Histogram(
        title=title,
        axis=axis,
        bars=bars_path(_bins(values, axis, bins)),
        null_bars=bars_path(_bins(nulls, axis, bins)),
        n=len(values),
        median=median,
        null_median=null_median,
        median_at=axis.place(median),
        null_at=None if null_median is None else axis.place(null_median),
        above=above,
        ticks=tuple((axis.place(tick), f"{tick:g}") for tick in ticks),
        label=label,
    )


def _bins(values: Sequence[float], axis: Axis, bins: int) -> list[int]:
    """How many values lie in each bin; those beyond the axis count at its ends."""
    counts, _ = np.histogram(np.clip(values, axis.low, axis.high), bins=bins, range=(axis.low, axis.high))
    return [int(count) for count in counts]

"""The choice among SAEs of several layers and sparsities, read from `selection.json` and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from feature_bank.errors import DataError

__all__ = ["Choice", "Plot", "Selection", "SelectionEntry", "draw_selection", "read_selection"]

FILE = "selection.json"
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 640.0, 14.0, 226.0  # of the plotting area, in the plot's own units
_INSET = 24.0  # of the first and last mark
_LABEL_GAP = 18.0


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class SelectionEntry(_Record):
    """One SAE and how well its features tell contrast pairs apart."""

    name: str
    hook_name: str
    l0: float = Field(gt=0.0)
    """Active features a token, mean."""
    i_cdf: FiniteFloat
    """Mean over its features of the share of pairs that each tells apart."""
    i_cdf_margin: FiniteFloat | None = None
    """How much of it is left when that of turned pairs is taken away."""
    separation: FiniteFloat | None = None
    """What the SAEs are ranked by: how well the best feature of each concept tells its pairs apart, over the null."""
    separation_error: FiniteFloat | None = None

    @property
    def null(self) -> float | None:
        """I_CDF with the pairs turned at random."""
        return None if self.i_cdf_margin is None else self.i_cdf - self.i_cdf_margin


class Choice(_Record):
    """The SAEs that were chosen, by name."""

    overall: str | None = None
    by_hook_point: Mapping[str, str] = Field(default_factory=dict)
    why: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that were chosen, overall or at their hook point."""
        return tuple(dict.fromkeys([*([self.overall] if self.overall else []), *self.by_hook_point.values()]))


class Selection(_Record):
    """What the page needs of `selection.json`; what else stands there is left alone."""

    saes: tuple[SelectionEntry, ...] = Field(min_length=1)
    choice: Choice = Choice()

    @model_validator(mode="after")
    def _known(self) -> Selection:
        names = [entry.name for entry in self.saes]
        if len(set(names)) != len(names):
            raise ValueError("saes names an SAE twice")
        if unknown := sorted(set(self.choice.names) - set(names)):
            raise ValueError(f"choice names {unknown[0]!r}, which is none of saes")
        return self


def read_selection(folder: Path) -> Selection:
    """Read the folder's `selection.json`.

    Raises DataError, naming the file and field, if it is missing or lacks what the page needs.
    """
    path = folder / FILE
    try:
        return Selection.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as e:
        raise DataError(f"{path}: not found; name the folder that `sailguard train select` wrote") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}, field {place!r}: {first['msg']}") from e
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{path}: is not valid JSON: {e}") from e


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An SAE in the plot."""

    x: float
    y: float
    name: str
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Series:
    """The SAEs of one hook point by sparsity."""

    hook_name: str
    number: int
    """Which of eight colours it has."""
    marks: tuple[Mark, ...]
    line: str
    null_line: str
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of SAEs against L0, a line for each hook point; coordinates of an area 880 by 270."""

    title: str
    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def draw_selection(selection: Selection) -> tuple[Plot, ...]:
    """Lay out the plots: separation, where it is known of every SAE, and I_CDF with its null."""
    plots = []
    if all(entry.separation is not None for entry in selection.saes):
        plots.append(_draw("Separation over its null", selection, lambda entry: entry.separation or 0.0))
    plots.append(_draw("I CDF", selection, lambda entry: entry.i_cdf, lambda entry: entry.null))
    return tuple(plots)


def _draw(
    title: str,
    selection: Selection,
    value: Callable[[SelectionEntry], float],
    null: Callable[[SelectionEntry], float | None] = lambda _: None,
) -> Plot:
    """The sparsities on a logarithmic axis, the figure from 0 or from its least value below."""
    sparsities = sorted({entry.l0 for entry in selection.saes})
    least, most = math.log(sparsities[0]), math.log(sparsities[-1])
    values = [number for entry in selection.saes for number in (value(entry), null(entry)) if number is not None]
    bottom, top = min(0.0, *values), max(0.0, *values)
    step = _round_step((top - bottom or 1.0) / 4)
    first, last = math.floor(bottom / step), max(math.ceil(top / step), 1)

    def x(l0: float) -> float:
        share = (math.log(l0) - least) / (most - least) if most > least else 0.5
        return round(_LEFT + _INSET + (_RIGHT - _LEFT - 2 * _INSET) * share, 1)

    def y(number: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (number / step - first) / (last - first), 1)

    hooks = list(dict.fromkeys(entry.hook_name for entry in sorted(selection.saes, key=_place)))
    groups = [sorted((e for e in selection.saes if e.hook_name == hook), key=lambda e: e.l0) for hook in hooks]
    labels = _spread([y(value(entries[-1])) for entries in groups])
    series = []
    for number, (hook, entries, label_y) in enumerate(zip(hooks, groups, labels, strict=True)):
        nulls = [(x(entry.l0), y(found)) for entry in entries if (found := null(entry)) is not None]
        points = [(x(entry.l0), y(value(entry))) for entry in entries]
        series.append(
            Series(
                hook_name=hook,
                number=number % 8,
                marks=tuple(
                    Mark(x=at[0], y=at[1], name=entry.name, chosen=entry.name in selection.choice.names)
                    for entry, at in zip(entries, points, strict=True)
                ),
                line=_line(points),
                null_line=_line(nulls),
                label_y=label_y,
            )
        )
    return Plot(
        title=title,
        series=tuple(series),
        x_ticks=tuple((x(l0), f"{l0:.3g}") for l0 in _thinned(sparsities)),
        y_ticks=tuple((y(i * step), f"{i * step:.3g}".replace("-", "\u2212")) for i in range(first, last + 1)),
    )


def _place(entry: SelectionEntry) -> list[tuple[int, str]]:
    """Hook points in the order of their layers: numbers in a name count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in entry.hook_name.split(".")]


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if len(points) > 1 else ""


def _spread(wanted: Sequence[float]) -> list[float]:
    """Heights of labels near the wanted ones, none on another."""
    placed = list(wanted)
    for before, after in pairwise(sorted(range(len(placed)), key=lambda i: placed[i])):
        placed[after] = max(placed[after], placed[before] + _LABEL_GAP)
    return placed


def _thinned(sparsities: Sequence[float]) -> list[float]:
    """Those whose labels have room: each at least a quarter above the last."""
    kept: list[float] = []
    for l0 in sparsities:
        if not kept or l0 > 1.25 * kept[-1]:
            kept.append(l0)
    return kept


def _round_step(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= value)

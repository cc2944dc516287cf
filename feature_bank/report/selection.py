"""The choice among SAEs of several layers and sparsities, read from `selection.json` and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from feature_bank.errors import DataError

__all__ = ["Plot", "Selection", "SelectionEntry", "draw_selection", "read_selection"]

FILE = "selection.json"
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 700.0, 14.0, 236.0  # of the plotting area, in the plot's own units


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class SelectionEntry(_Record):
    """One SAE and how well its features tell contrast pairs apart."""

    name: str
    hook_name: str
    l0: float = Field(gt=0.0)
    """Active features a token, mean."""
    i_cdf: FiniteFloat
    """Mean distinguishing frequency of its features."""
    null: FiniteFloat | None = None
    """The same with the pairs shuffled."""


class Selection(_Record):
    """What the page needs of `selection.json`; what else stands there is left alone."""

    saes: tuple[SelectionEntry, ...] = Field(min_length=1)
    choice: tuple[str, ...] = ()
    """Names of the SAEs that were chosen."""

    @model_validator(mode="after")
    def _known(self) -> Selection:
        names = [entry.name for entry in self.saes]
        if len(set(names)) != len(names):
            raise ValueError("saes names an SAE twice")
        if unknown := sorted(set(self.choice) - set(names)):
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
    marks: tuple[Mark, ...]
    line: str
    null_line: str
    label_y: float


@dataclass(frozen=True, kw_only=True)
class Plot:
    """I_CDF against L0, a line for each hook point; coordinates of an area 880 by 280."""

    series: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def draw_selection(selection: Selection) -> Plot:
    """Lay out the plot: the sparsities on a logarithmic axis, I_CDF from 0."""
    sparsities = sorted({entry.l0 for entry in selection.saes})
    lowest, highest = math.log(sparsities[0]), math.log(sparsities[-1])
    top = max(max(entry.i_cdf, entry.null or 0.0) for entry in selection.saes) * 1.05 or 1.0

    def x(l0: float) -> float:
        inset = 24.0
        if highest == lowest:
            return round((_LEFT + _RIGHT) / 2, 1)
        return round(_LEFT + inset + (_RIGHT - _LEFT - 2 * inset) * (math.log(l0) - lowest) / (highest - lowest), 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * max(0.0, value) / top, 1)

    hooks = list(dict.fromkeys(entry.hook_name for entry in selection.saes))
    groups = {
        hook: sorted((e for e in selection.saes if e.hook_name == hook), key=lambda entry: entry.l0) for hook in hooks
    }
    labels = _spread([y(groups[hook][-1].i_cdf) for hook in hooks])
    series = []
    for number, hook in enumerate(hooks):
        entries = groups[hook]
        nulls = [(x(entry.l0), y(entry.null)) for entry in entries if entry.null is not None]
        series.append(
            Series(
                hook_name=hook,
                number=number % 8,
                marks=tuple(
                    Mark(x=x(e.l0), y=y(e.i_cdf), name=e.name, chosen=e.name in selection.choice) for e in entries
                ),
                line=_line([(x(entry.l0), y(entry.i_cdf)) for entry in entries]),
                null_line=_line(nulls),
                label_y=labels[number],
            )
        )
    step = _round_step(top / 4)
    y_ticks = [i * step for i in range(int(top / step) + 1)]
    return Plot(
        series=tuple(series),
        x_ticks=tuple((x(l0), f"{l0:.3g}") for l0 in _thinned(sparsities)),
        y_ticks=tuple((y(value), f"{value:.3g}") for value in y_ticks),
    )


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if len(points) > 1 else ""


def _spread(wanted: Sequence[float], gap: float = 18.0) -> list[float]:
    """Heights of labels near the wanted ones, none on another."""
    placed = list(wanted)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    return placed


def _thinned(sparsities: Sequence[float]) -> list[float]:
    """Those whose labels have room: each at least a tenth above the last."""
    kept: list[float] = []
    for l0 in sparsities:
        if not kept or l0 > 1.1 * kept[-1]:
            kept.append(l0)
    return kept


def _round_step(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= value)

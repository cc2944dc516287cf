"""How the project's plots look, and how they are made: without pyplot, without a window, the same bytes each time.

matplotlib's settings are as they were afterwards. Colours are Okabe and Ito's, which colour-blind readers can tell
apart, and each series has a marker of its own besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SETTINGS: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "figure.dpi": 100,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "svg.hashsalt": "sailguard",  # else ids in the file are random
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def plot_settings() -> Iterator[None]:
    """While the context lasts, matplotlib has the project's settings. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise MissingExtraError("plots need matplotlib: pip install 'sailguard[train]'") from e
    with matplotlib.rc_context():  # a user's own settings must not decide what a report looks like
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """Write the figure to `stem`.png and `stem`.svg, without the time in them."""
    figure.savefig(stem.with_name(f"{stem.name}.png"), metadata={"Software": None})
    figure.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None, "Creator": None})


def series_style(index: int) -> dict[str, str]:
    """Colour and marker of series `index`: 49 pairs, of which neighbours differ in both."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
    }


def plain_name(text: str, length: int = 64) -> str:
    """A name as the plots' font can show it; its end tells names apart best. The table has it in full."""
    shown = "".join(c if " " <= c <= "~" else "?" for c in text)
    return shown if len(shown) <= length else f"...{shown[3 - length :]}"


def set_text(text: Any, shown: str) -> None:
    """Text as it stands: a dollar sign in a name begins no formula."""
    text.set_parse_math(False)
    text.set_text(shown)


def add_legend(owner: Any, handles: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    """A legend of a figure or of axes, in which names stand as they are."""
    legend = owner.legend(handles, [str(i) for i in range(len(names))], **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        set_text(text, plain_name(name))

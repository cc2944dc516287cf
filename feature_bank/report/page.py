"""The report of a bank: one HTML file that asks for nothing from anywhere, and in which nothing that it quotes can act.

Whatever comes from the bank passes through the template engine's escaping and `visible`. The browser is told the hashes
of the page's own script and style, so that it would run no other even if one got in.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_bank.atomic import atomic_file
from feature_bank.bank import Bank
from feature_bank.errors import DataError
from feature_bank.report import overview
from feature_bank.report.cards import make_cards
from feature_bank.report.coverage import cover, index_concepts
from feature_bank.report.reviews import Reviews, read_reviews
from feature_bank.report.selection import Selection, draw_selection, read_selection
from feature_bank.report.text import visible, visible_token
from feature_bank.taxonomy import DOMAINS, Taxonomy, load_taxonomy

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Written", "render_report", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report on disk."""

    path: Path
    bank: str
    """Name and version of the bank."""
    features: int
    size: int
    """Bytes."""


def write_report(
    folder: Path, out: Path, *, selection: Path | None = None, taxonomy: Path | None = None, overwrite: bool = False
) -> Written:
    """Write the report of the bank in `folder` to the file `out`, atomically.

    selection: a folder with the `selection.json` of `sailguard train select`. taxonomy: a folder of taxonomy files in
    place of the shipped ones, for the table of concepts. The same bank gives the same bytes.

    Raises BankError for a bank that is missing or damaged; DataError if `out` exists and `overwrite` is not set, if it
    cannot be written, or for a selection or taxonomy that is missing or malformed.
    """
    if out.is_dir():
        raise DataError(f"{out}: a folder; name a file, such as {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise DataError(f"{out}: exists; name another file, or add --overwrite")
    bank = Bank.load(folder)
    page = render_report(
        bank,
        reviews=read_reviews(folder),
        selection=read_selection(selection) if selection is not None else None,
        taxonomy=load_taxonomy(taxonomy),
    ).encode()
    try:
        with atomic_file(out) as tmp:
            tmp.write_bytes(page)
    except OSError as e:
        raise DataError(f"{out}: cannot be written: {e.strerror}; name a place where you may write") from e
    return Written(path=out, bank=bank.version, features=len(bank.features), size=len(page))


def render_report(
    bank: Bank, *, taxonomy: Taxonomy, reviews: Reviews | None = None, selection: Selection | None = None
) -> str:
    """The page as text. It depends on its arguments alone: there is no date in it but the bank's."""
    environment = _environment()
    style, script = (_read(name) for name in ("style.css", "filters.js"))
    cards = make_cards(bank, reviews or {})
    concepts = index_concepts(taxonomy)
    features = [card.record for card in cards]
    return environment.get_template("page.html.j2").render(
        bank=bank,
        manifest=bank.manifest,
        domains=DOMAINS,
        cards=cards,
        admitted=sum(feature.admitted for feature in features),
        reviewed=sum(bool(card.verdict) for card in cards),
        layers=sorted({feature.layer for feature in features}),
        concepts=concepts,
        quality=overview.quality(bank.manifest.quality),
        rates=overview.head_rates(bank.heads.values()),
        counts=overview.counts(features),
        fidelity=overview.fidelity_histograms(features),
        detection=overview.detection_histograms(features),
        admission=overview.admission(cards),
        rules=overview.failed_rules(features),
        coverage=cover(features, concepts),
        duplicates=overview.duplicate_pairs(features),
        selection=selection,
        plots=draw_selection(selection) if selection is not None else (),
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=lambda value, digits=3: f"{value:.{digits}f}".replace("-", "\u2212"),
        signed=lambda value, digits=2: f"{value:+.{digits}f}".replace("-", "\u2212"),
        thousands=lambda value: f"{value:,}",
        brief=lambda value: f"{value:.4g}".replace("-", "\u2212"),
        token=visible_token,
    )
    return environment


def _finalize(value: Any) -> Any:
    """What an expression of a template puts on the page, before it is escaped."""
    if type(value) is str:  # markup, which is a kind of str, is the template's own
        return visible(value)
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else value


def _read(name: str) -> Any:
    from markupsafe import Markup

    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    """A source of the content security policy that stands for exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

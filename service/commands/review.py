"""`bank review`: verdicts on features, one by one, many from a file, or in a walk on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import BankError, DataError
from service.commands.bank_reader import place_of, read_labelled
from service.commands.card import review_line
from service.commands.features import LayerFilter
from service.commands.options import BankArgument, JsonOption
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from feature_bank.bank import Bank
    from feature_bank.review import Draft, Review

__all__ = ["review"]

NOTHING = "none"  # as the only domain or concept: the feature shall have none


def review(
    path: BankArgument = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", metavar="ID", help="Such as L14/12. May be given several times.")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="The label is right.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="The guard shall not use it. Needs a reason.")] = False,
    relabel: Annotated[
        bool, typer.Option("--relabel", help="Right with the given --domain, --concept or --explanation.")
    ] = False,
    note: Annotated[bool, typer.Option("--note", help="Put the reason on record, no more.")] = False,
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", help="With --relabel: its domains, or `none`. In a walk: only those of this domain."),
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option("--concept", help="With --relabel: its concepts, or `none`.")
    ] = None,
    explanation: Annotated[str | None, typer.Option("--explanation", help="With --relabel: its explanation.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why.")] = "",
    reviewer: Annotated[
        str | None, typer.Option("--reviewer", metavar="NAME", help="Who. Default: the variable USER.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Reviews as JSON lines. All are valid, or none is written."),
    ] = None,
    layer: LayerFilter = None,
    unreviewed: Annotated[
        bool, typer.Option("--unreviewed/--all", help="Walk through the features without a verdict, or all.")
    ] = True,
    as_list: Annotated[bool, typer.Option("--list", help="Show the reviews that were given.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Review features: --accept, --reject, --relabel or --note one, or walk through them on a terminal.

    Reviews are appended to the bank's reviews.jsonl. They change what is shown at once, and what the guard does with
    the next version that is refitted.
    """
    verdicts = [
        name for name, given in (("accept", accept), ("reject", reject), ("relabel", relabel), ("note", note)) if given
    ]
    if len(verdicts) + (file is not None) + as_list > 1:
        raise DataError("--accept, --reject, --relabel, --note, --from and --list: give one of them")
    if as_list or (as_json and not verdicts and file is None):
        _show_history(path, feature, as_json)
        return
    place = _writable_place(path)
    if verdicts:
        who = _reviewer(reviewer)
        drafts = _drafts(verdicts[0], feature, _overrides(domain, concept, explanation), who, reason)
    elif file is not None:
        drafts = _read_drafts(file, reviewer)
    else:
        _walk(place, feature, domain, layer, unreviewed, reviewer)
        return
    _write(place, drafts, as_json, source=file)


def _drafts(
    verdict: str, features: Sequence[str] | None, overrides: dict[str, Any], reviewer: str, reason: str
) -> list[Draft]:
    from feature_bank.review import Draft
    from feature_bank.verdicts import parse_record

    if not features:
        raise DataError(f"--{verdict}: name the feature with --feature")
    data = {"verdict": verdict, "reviewer": reviewer, "reason": reason, "overrides": overrides or None}
    return [parse_record(Draft, {"feature": name, **data}, f"--feature {name}") for name in dict.fromkeys(features)]


def _overrides(
    domains: Sequence[str] | None, concepts: Sequence[str] | None, explanation: str | None
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, values in (("domains", domains), ("concepts", concepts)):
        if values:
            given[name] = [] if list(values) == [NOTHING] else list(dict.fromkeys(values))
    if explanation is not None:
        given["explanation"] = explanation
    return given


def _read_drafts(file: Path, reviewer: str | None) -> list[Draft]:
    """The reviews of a file. A line that names no reviewer is given by `reviewer`."""
    from feature_bank.review import Draft
    from feature_bank.verdicts import parse_record

    drafts = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{file}, line {number}: is not valid JSON: {e}") from e
        if isinstance(data, dict) and "reviewer" not in data:
            data["reviewer"] = _reviewer(reviewer)
        drafts.append(parse_record(Draft, data, f"{file.name}:{number}"))
    if not drafts:
        raise DataError(f"{file}: holds no reviews")
    return drafts


def _write(place: Path, drafts: Sequence[Draft], as_json: bool, *, source: Path | None) -> None:
    from feature_bank.bank import Bank
    from feature_bank.review import append_reviews, check_drafts

    bank = Bank.load(place)
    for number, draft in enumerate(drafts, 1):
        try:
            check_drafts(bank, [draft])
        except BankError as e:
            raise BankError(e.message, file=f"{source.name}, review {number}" if source else None, field=e.field) from e
    written = append_reviews(place, drafts, bank=bank)
    if as_json:
        print_json([review.model_dump(exclude_none=True) for review in written])
    else:
        _print_reviews(bank, written)


def _show_history(path: Path | None, features: Sequence[str] | None, as_json: bool) -> None:
    bank, log, _ = read_labelled(path)
    shown = [review for review in log.reviews if not features or review.feature in features]
    if as_json:
        print_json([review.model_dump(exclude_none=True) for review in shown])
        return
    _print_reviews(bank, shown)
    output_console().print(f"{len(shown)} of {len(log.reviews)} reviews", style="dim")


def _print_reviews(bank: Bank, reviews: Sequence[Review]) -> None:
    console = output_console()
    for review in reviews:
        console.print(f"{review.feature:<10} {review_line(review, bank)}", markup=False, soft_wrap=True)


def _walk(
    place: Path,
    features: Sequence[str] | None,
    domains: Sequence[str] | None,
    layer: int | None,
    unreviewed: bool,
    reviewer: str | None,
) -> None:
    from feature_bank.search import FeatureFilter
    from service.commands.review_walk import Walk

    if not sys.stdin.isatty():
        raise DataError("name a verdict (--accept, --reject, --relabel, --note) or --from, or review on a terminal")
    if domains and len(domains) > 1:
        raise DataError("--domain: a walk takes one domain")
    bank, _, labels = read_labelled(place)
    wanted = FeatureFilter(
        domain=domains[0] if domains else None, layer=layer, status="unreviewed" if unreviewed else None
    )
    chosen = [f for f in wanted.select(bank, labels) if not features or f.id in features]
    if not chosen:
        output_console().print("no feature is left to review; --all walks through those with a verdict too")
        return
    walk = Walk(place, bank, reviewer=_reviewer(reviewer), console=output_console(), ask=input)
    try:
        walk.go(chosen)
    finally:  # what was written stays, however the walk ends
        error_console().print(f"{walk.written} reviews written", style="dim")


def _writable_place(path: Path | None) -> Path:
    place = place_of(path)
    if path is None:
        raise BankError(
            "is a part of the package; `sailguard bank promote --store DIR` makes a copy, which "
            "`sailguard bank review DIR` reviews",
            file=plain(str(place)),
        )
    return place


def _reviewer(given: str | None) -> str:
    """Who reviews: as given, or the user's name, or who a terminal says it is. Never empty."""
    name = os.environ.get("USER", "") if given is None else given
    if not name.strip() and given is None and sys.stdin.isatty():
        name = input("your name: ")
    if not name.strip():
        raise DataError("--reviewer: name who gives the review")
    return name

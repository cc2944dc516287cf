"""What a spool holds for a refresh: items that people marked, and items that nobody did, as their features saw them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from feature_bank.errors import DataError
from feature_bank.spool import Selection, Spool, SpoolItem
from training.calibration import BoolArray
from training.corpus import Document
from training.refresh_texts import Ints, Texts, join_texts
from training.refresh_traffic import document_of, held_out

__all__ = ["Items", "Taken", "read_items", "take_items"]

NO_TEXT = "without text, which new features have to read"
FOREIGN = (
    "judged with a bank that is not known here to have the same features (name its folder of versions with --store), "
    "and without text"
)
UNMARKED = 2000  # the newest items that nobody marked: enough to tell a changed decision in a thousand
Reader = Callable[[Sequence[Document]], Texts]
"""What the bank's features give on documents, in their order."""


Marked = tuple[SpoolItem, Mapping[str, bool]]
"""An item, and what people said of it, by domain."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a spool held at one time: a live one goes on growing, and two banks are to be asked about the same items."""

    marked: tuple[Marked, ...]
    unmarked: tuple[Marked, ...]
    """The newest, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """Items of a spool, in order."""

    texts: Texts
    ids: tuple[int, ...]
    streamed: BoolArray
    """Which were judged token by token."""
    held_out: BoolArray
    labels: tuple[Mapping[str, bool], ...]
    """What people said of each, by domain; of one that nobody marked nothing."""
    flagged: tuple[frozenset[str], ...]
    """The domains in which each was flagged when it was served."""
    judged: tuple[str, ...]
    """The content hash of the bank that judged each."""
    skipped: Mapping[str, int]
    """Items that could not be used, by the reason."""

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, domain: str, *, streaming: bool | None = None, held_out: bool | None = None) -> Ints:
        """The places of the items that are marked in a domain, of a form and a side if that is given."""
        found = [
            place
            for place, labels in enumerate(self.labels)
            if domain in labels
            and streaming in (None, bool(self.streamed[place]))
            and held_out in (None, bool(self.held_out[place]))
        ]
        return np.array(found, dtype=np.int64)

    def truth(self, domain: str, places: Ints) -> BoolArray:
        """What people said of the items at `places`."""
        return np.array([self.labels[place][domain] for place in places.tolist()], dtype=np.bool_)

    def mistaken(self, domain: str, places: Ints) -> BoolArray:
        """At which of the places people said something else than the guard did."""
        said = (self.labels[p][domain] != (domain in self.flagged[p]) for p in places.tolist())
        return np.fromiter(said, dtype=np.bool_, count=len(places))


def take_items(path: Path, *, most: int = UNMARKED) -> Taken:
    """The marked items of a spool, and the newest unmarked ones. Raises DataError for a file that is no spool."""
    with Spool.open_for_reading(path) as spool:
        marked = tuple(spool.marked())
        newest = reversed(spool.newest(Selection(marked=False), limit=most))
        found = (spool.item(item.id) for item in newest if item.id is not None)
        unmarked: tuple[Marked, ...] = tuple((item, {}) for item in found if item is not None)  # some may be gone
    return Taken(marked=marked, unmarked=unmarked)


def read_items(
    items: Sequence[Marked],
    path: Path,
    *,
    features: int,
    hashes: Collection[str],
    domains: Collection[str],
    read: Reader,
    texts_only: bool = False,
    apart: Collection[str] = (),
) -> Items:
    """What was taken of the spool at `path`, as a bank's features saw it.

    features: how many the bank has. hashes: content hashes of the banks whose features are the same as the bank's.
    Items of others are read anew from their texts, by `read`, or counted as skipped if these were not kept.
    domains: those that the bank has a head for. texts_only: read all from their texts, and skip those without.
    apart: texts that are only measured on; items with them are skipped.

    Raises DataError for a damaged item.
    """
    skipped: Counter[str] = Counter()
    parts: list[Texts | None] = []
    documents: list[Document] = []
    ids, streamed, held, labels, flagged, judged = [], [], [], [], [], []
    for item, said in items:
        known = {domain: label for domain, label in said.items() if domain in domains}
        foreign = texts_only or item.content_hash not in hashes
        if item.text in apart:
            skipped["whose text is measured on"] += 1
        elif foreign and not item.text:
            skipped[NO_TEXT if texts_only else FOREIGN] += 1
        elif said and not known:
            skipped["marked in a domain that the bank has no head for"] += 1
        elif not item.tokens:
            skipped["without a judged token"] += 1
        else:
            parts.append(None if foreign else _texts(item, features, path))
            if foreign:
                documents.append(document_of(item, known))
            ids.append(int(item.id or 0))
            streamed.append(item.streamed)
            held.append(held_out(item))
            labels.append(known)
            flagged.append(frozenset(item.flagged))
            judged.append(item.content_hash)
    return Items(
        texts=join_texts(_filled(parts, documents, read), features),
        ids=tuple(ids),
        streamed=np.array(streamed, dtype=np.bool_),
        held_out=np.array(held, dtype=np.bool_),
        labels=tuple(labels),
        flagged=tuple(flagged),
        judged=tuple(judged),
        skipped=dict(skipped),
    )


def _filled(parts: Sequence[Texts | None], documents: Sequence[Document], read: Reader) -> list[Texts]:
    """The parts, and in the place of each that is missing the next of the documents."""
    if not documents:
        return [part for part in parts if part is not None]
    found = read(documents)
    numbers = iter(range(len(documents)))
    return [found.choose(np.array([next(numbers)])) if part is None else part for part in parts]


def _texts(item: SpoolItem, features: int, path: Path) -> Texts:
    segments, acts = item.activations()
    if acts.shape[1] != features:
        raise DataError(f"{path}, item {item.id}: {acts.shape[1]} features, but the bank that it names has {features}")
    numbers = np.unique(segments, return_inverse=True)[1].astype(np.int64)
    place = np.zeros(len(segments), dtype=np.int64)
    return Texts(acts=sparse.csr_matrix(acts), text=place, segment=numbers, n=1)

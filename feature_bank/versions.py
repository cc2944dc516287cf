"""A folder of versions of a bank, of which one is the current one.

    versions/NAME@VERSION+HASH/    verified copies of banks, never changed but for their reviews
    current -> versions/...        a link, replaced by a rename: whoever reads it finds the old version or the new one
    history.jsonl                  what became current when, append-only
    .lock                          held by who promotes or rolls back

`Bank.load` takes the folder itself, or `current`. A process that is killed in the middle leaves `current` as it was or
as it shall be; if the history lacks the last step, the next command adds it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from feature_bank.atomic import atomic_folder
from feature_bank.bank import CURRENT, HASHED, MANIFEST, REVIEWS, Bank, bank_folder
from feature_bank.errors import BankError
from feature_bank.journal import Journal, hold, read
from feature_bank.review import Review, load_reviews, merge_reviews, parse_reviews
from feature_bank.schema import Record, Sha256
from feature_bank.verdicts import Moment, parse_record, write_moment

__all__ = ["Event", "StoredVersion", "Switch", "VersionStore"]

VERSIONS = "versions"
HISTORY = "history.jsonl"
_LOCK = ".lock"
_NEXT = ".current.next"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,199}")


class Event(Record):
    """One line of history.jsonl."""

    action: Literal["promote", "rollback", "found"]
    """`found`: it was current without a line that says so, after a crash or by hand."""
    version: str
    """As `Bank.version` writes it, which is the folder's name too."""
    content_hash: Sha256 | None = None
    previous: str | None = None
    """What was current before."""
    time: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What a promotion or a rollback did."""

    version: str
    previous: str | None
    carried: int
    """Reviews that the version did not have before."""

    @property
    def changed(self) -> bool:
        """Whether another version is current now."""
        return self.version != self.previous


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """One version of a store."""

    version: str
    folder: Path
    current: bool
    since: str | None
    """When it last became current."""
    bank: Bank | None
    problem: str | None = None
    """Why the copy cannot be loaded."""


class VersionStore:
    """The versions in one folder. Nothing is written before the first promotion."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def current(self) -> str | None:
        """The name of the current version, or None. Raises BankError if `current` is not a link into the store."""
        link = self.folder / CURRENT
        if not link.is_symlink():
            if link.exists():
                raise BankError("is no link to a version; move it away", file=str(link))
            return None
        target = Path(os.readlink(link))
        if target.parent != Path(VERSIONS):
            raise BankError(f"points to {str(target)!r} and not into {VERSIONS}/; remove it", file=str(link))
        return target.name

    def history(self) -> list[Event]:
        """What became current, oldest first. Raises BankError naming the line for a malformed one."""
        content = read(self.folder / HISTORY)
        return [parse_record(Event, entry.data, f"{HISTORY}:{entry.line}") for entry in content.entries]

    def versions(self) -> list[StoredVersion]:
        """Every version, in the order in which they were first promoted. Each is verified."""
        current = self.current
        since = {event.version: event.time for event in self.history()}
        names = list(since)
        found = sorted(self._names(), key=lambda name: (names.index(name) if name in since else len(names), name))
        return [self._stored(name, name == current, since.get(name)) for name in found]

    def promote(self, source: str | Path, *, replaces: str | None = None) -> Switch:
        """Copy the bank at `source` into the store, verified, with the reviews of both, and make it the current one.

        replaces: the version that it was compared with; another one is not replaced.

        Raises BankError for a bank or reviews that do not verify, or another current version; the store is as it was
        then.
        """
        place = Path(os.path.realpath(bank_folder(source)))
        bank = Bank.load(place)
        reviews = load_reviews(place).reviews
        name = _checked_name(bank)
        if (self.folder / MANIFEST).exists():
            raise BankError("is a bank itself; name another folder for its versions", file=str(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._reviews_of_current() as held:
            previous = self.current
            if replaces is not None and previous not in (None, replaces):
                raise BankError(
                    f"{previous} is the current version, and {name} was compared with {replaces}", file=str(self.folder)
                )
            self._record_found()
            if (self.folder / VERSIONS / name).exists():
                carried = self._merge(name, bank.content_hash, reviews, held)
            else:
                carried = self._copy(place, name, bank, reviews, held)
            self._switch("promote", name, bank.content_hash, previous)
        return Switch(version=name, previous=previous, carried=carried)

    def rollback(self, to: str | None = None) -> Switch:
        """Make another version current: `to`, or the one that was current before this one.

        to: a version's name, its VERSION part, or the beginning of either; it must mean one version.

        Raises BankError if there is no such version, or if it does not verify; the store is as it was then.
        """
        if not (self.folder / VERSIONS).is_dir():
            raise BankError("holds no versions; `sailguard bank promote` puts one there", file=str(self.folder))
        with self._locked(), self._reviews_of_current() as held:
            previous = self.current
            self._record_found()
            name = self._before(previous) if to is None else self._named(to)
            bank = Bank.load(self.folder / VERSIONS / name)
            carried = self._merge(name, bank.content_hash, (), held)
            self._switch("rollback", name, bank.content_hash, previous)
        return Switch(version=name, previous=previous, carried=carried)

    def _names(self) -> list[str]:
        folder = self.folder / VERSIONS
        if not folder.is_dir():
            raise BankError("holds no versions; `sailguard bank promote` puts one there", file=str(self.folder))
        return [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]

    def _stored(self, name: str, current: bool, since: str | None) -> StoredVersion:
        folder = self.folder / VERSIONS / name
        bank, problem = None, None
        try:
            bank = Bank.load(folder)
        except BankError as e:
            problem = str(e)
        return StoredVersion(version=name, folder=folder, current=current, since=since, bank=bank, problem=problem)

    def _before(self, current: str | None) -> str:
        """The version before the current one. Steps that were rolled back do not count."""
        steps: list[str] = []
        for event in self.history():
            if event.action == "rollback" and event.version in steps:
                while steps[-1] != event.version:
                    steps.pop()
            elif not steps or steps[-1] != event.version:
                steps.append(event.version)
        if len(steps) < 2 or steps[-1] != current:
            raise BankError("no version was current before this one; name one with --to", file=str(self.folder))
        return steps[-2]

    def _named(self, wanted: str) -> str:
        names = self._names()
        exact = [name for name in names if wanted in (name, name.rpartition("@")[2].rpartition("+")[0])]
        found = exact or [n for n in names if wanted and (n.startswith(wanted) or n.split("@")[-1].startswith(wanted))]
        if len(found) != 1:
            which = f"could be {', '.join(sorted(found))}" if found else f"is none of {', '.join(sorted(names))}"
            raise BankError(f"the version {wanted!r} {which}", file=str(self.folder), field="--to")
        return found[0]

    def _copy(self, source: Path, name: str, bank: Bank, reviews: Sequence[Review], held: Journal | None) -> int:
        ours = () if held is None else parse_reviews(held.read()).reviews
        target = self.folder / VERSIONS / name
        for left in target.parent.glob(".*.tmp"):  # of a process that was killed: the lock is held
            shutil.rmtree(left, ignore_errors=True)
        with atomic_folder(target) as tmp:
            for file in (MANIFEST, *HASHED):
                shutil.copyfile(source / file, tmp / file)
            if Bank.load(tmp).content_hash != bank.content_hash:
                raise BankError("was changed while it was copied; try again", file=str(source))
            with hold(tmp / REVIEWS) as journal:
                return merge_reviews(journal, (*reviews, *ours)) - len(reviews)

    def _merge(self, name: str, content_hash: str, reviews: Sequence[Review], held: Journal | None) -> int:
        """Add to a version that is there the reviews of a bank that is promoted, and of the current version."""
        folder = self.folder / VERSIONS / name
        found = Bank.load(folder)
        if found.content_hash != content_hash:
            raise BankError("another bank has this name in the store; give the new one another version", file=name)
        if held is not None and name == self.current:
            return merge_reviews(held, reviews)
        ours = () if held is None else parse_reviews(held.read()).reviews
        with hold(folder / REVIEWS) as journal:
            return merge_reviews(journal, (*reviews, *ours))

    def _switch(
        self, action: Literal["promote", "rollback"], name: str, content_hash: str, previous: str | None
    ) -> None:
        if name == previous:
            return
        link = self.folder / _NEXT
        link.unlink(missing_ok=True)
        try:
            os.symlink(os.path.join(VERSIONS, name), link)
            os.replace(link, self.folder / CURRENT)
        except BaseException:
            link.unlink(missing_ok=True)
            raise
        self._record(Event(action=action, version=name, content_hash=content_hash, previous=previous, time=_now()))

    def _record_found(self) -> None:
        """Give the current version a line of history if it has none."""
        current, events = self.current, self.history()
        last = events[-1].version if events else None
        if current is not None and current != last:
            self._record(Event(action="found", version=current, previous=last, time=_now()))

    def _record(self, event: Event) -> None:
        with hold(self.folder / HISTORY) as journal:  # syncs the folder, and with it the link
            journal.append([event.model_dump(exclude_none=True)])

    @contextmanager
    def _reviews_of_current(self) -> Iterator[Journal | None]:
        """The reviews of the current version. Who reviews it meanwhile waits, and then reviews the next one."""
        if self.current is None or not (self.folder / CURRENT).exists():  # none yet, or its folder is gone
            yield None
        else:
            with hold(self.folder / CURRENT / REVIEWS) as journal:
                yield journal

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _checked_name(bank: Bank) -> str:
    if not _NAME.fullmatch(bank.version):
        raise BankError(
            f"{bank.version!r} cannot name a folder; use letters, digits and . _ + - in the bank's name and version",
            file=MANIFEST,
            field="name",
        )
    return bank.version


def _now() -> str:
    return write_moment(datetime.now(UTC))

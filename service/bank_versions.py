"""The versions of the server's bank, where it lies in a folder of them."""

from __future__ import annotations

from pathlib import Path

from feature_bank.bank import CURRENT
from feature_bank.versions import VERSIONS, VersionStore
from service.schemas_admin import BankVersion

__all__ = ["Versions", "store_at"]


class Versions(VersionStore):
    """The versions of a bank, as far as they are shown and chosen here."""

    def listed(self) -> list[BankVersion]:
        """Every version, the one that came last to the end; none of them is read."""
        current, since = self.current, {event.version: event.time for event in self.history()}
        names = sorted(self._names(), key=lambda name: (since.get(name, ""), name))
        return [BankVersion(version=name, current=name == current, since=since.get(name)) for name in names]

    def chosen(self, to: str | None) -> str:
        """The version that `to` means, or the one before the current one. Raises BankError if there is none."""
        return self._before(self.current) if to is None else self._named(to)


def store_at(place: Path) -> Versions | None:
    """The store that a bank's path means: the folder of versions itself, or the link in it."""
    folder = place.parent if place.name == CURRENT else place
    return Versions(folder) if (folder / CURRENT).is_symlink() and (folder / VERSIONS).is_dir() else None

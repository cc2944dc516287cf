"""The files of the bank and the policy as the file system sees them: whether they changed, and whether they still
change.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from feature_bank.bank import HASHED, MANIFEST, bank_folder
from feature_bank.errors import SailguardError
from service.policies import policy_files

__all__ = ["Looks", "Part", "Signature", "UnsettledError", "WatchedFiles", "What", "parts_of"]

Part = Literal["bank", "policy"]
What = Literal["bank", "policy", "all"]
Signature = tuple[object, ...]
"""Of each file its place, inode, times and size: another one once a file is replaced or written to."""
Looks = dict[Part, Signature]

_SETTLE_SECONDS = 0.1
_SETTLE_LOOKS = 50


class UnsettledError(SailguardError):
    """Files keep changing: somebody is in the middle of writing them."""


def parts_of(what: What) -> tuple[Part, ...]:
    """The parts that `what` means."""
    return ("bank", "policy") if what == "all" else (what,)


class WatchedFiles:
    """The files of one bank, in its folder or the current one of a folder of versions, and of one policy, or none."""

    def __init__(self, bank: Path, policy: Path | None) -> None:
        self.bank = bank
        self.policy = policy
        self._policy_files: Sequence[Path] = ()
        self._policy_looked: Signature = ()

    def bank_folder(self) -> Path:
        """The folder that holds the bank's files now, with no link on the way to it."""
        return Path(os.path.realpath(bank_folder(self.bank)))

    def look(self, what: What) -> Looks:
        """How the files are. Blocks for as long as the file system does."""
        looks: dict[Part, Signature] = {}
        for part in parts_of(what):
            looks[part] = self._look_at_bank() if part == "bank" else self._look_at_policy()
        return looks

    async def settled(self, what: What) -> Looks:
        """How the files are once they stay the same for a moment. Raises UnsettledError if they do not."""
        before = await asyncio.to_thread(self.look, what)
        for _ in range(_SETTLE_LOOKS):
            await asyncio.sleep(_SETTLE_SECONDS)
            found = await asyncio.to_thread(self.look, what)
            if found == before:
                return found
            before = found
        raise UnsettledError("the files keep changing; try again once they are complete")

    def _look_at_bank(self) -> Signature:
        try:
            folder = self.bank_folder()
        except OSError:  # its folder may not be entered
            return ()
        return _stats([folder / name for name in (MANIFEST, *HASHED)])

    def _look_at_policy(self) -> Signature:
        if self.policy is None:
            return ()
        found = _stats(self._policy_files)
        if not self._policy_files or found != self._policy_looked:
            # Which files they are stands in the files: they are read again only if one has changed.
            files = policy_files(self.policy)
            found = _stats(files)
            self._policy_files, self._policy_looked = files, found
        return found


def _stats(files: Sequence[Path]) -> Signature:
    return tuple((str(file), _stat(file)) for file in files)


def _stat(file: Path) -> Signature | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size

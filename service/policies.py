"""The versions of a policy file: what it held before, kept beside it, so that any of them can be put back.

    policy.yaml                          what is in use, replaced by a rename
    policy.yaml.versions/SHA256.yaml     texts that were in place, byte for byte
    policy.yaml.versions/history.jsonl   what came into place when and by which key, append-only
    policy.yaml.versions/.lock           held by who puts one into place

The file may be changed by hand too; the next change over the server keeps what it finds there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from feature_bank.atomic import atomic_file
from feature_bank.errors import SailguardError
from feature_bank.journal import hold, read
from feature_bank.schema import Record, Sha256
from feature_bank.verdicts import Moment, parse_record, write_moment
from guard.errors import PolicyError
from guard.policy import Policy
from guard.policy_file import read_policy_text, shipped_policies

__all__ = ["MAX_POLICY", "Draft", "PolicyEvent", "PolicyStore", "check_sent", "drafted", "policy_files", "sent"]

MAX_POLICY = 64 * 1024
"""Most characters of a policy that the server is sent."""
HISTORY = "history.jsonl"
_LOCK = ".lock"
_DEPTH = 8  # files of which each extends the next
T = TypeVar("T")


class PolicyEvent(Record):
    """One line of history.jsonl."""

    action: Literal["promote", "rollback", "found"]
    """`found`: it was in place without a line that says so: it was put there by hand."""
    version: str
    """As `Policy.version` writes it; empty for a text that is no policy."""
    sha256: Sha256
    """Of the file, which names the copy that is kept."""
    by: str | None = None
    """Id of the key that asked for it."""
    time: Moment


class PolicyStore:
    """The versions of one policy file. Nothing is written before the first change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = file.with_name(f"{file.name}.versions")

    def check_changeable(self) -> None:
        """Raise PolicyError unless the policy is a file that can be replaced."""
        if self.file.is_symlink():
            raise PolicyError(
                f"the policy file {self.file.name!r} is a link, which something else sets: change what it leads to"
            )
        if not self.file.is_file():
            raise PolicyError(
                f"the server's policy {str(self.file)!r} is no file that can be changed; start it with one"
            )

    def read(self) -> bytes:
        """What the file holds now."""
        return self.file.read_bytes()

    def history(self) -> list[PolicyEvent]:
        """What came into place, oldest first. Raises BankError naming the line for a malformed one."""
        content = read(self.folder / HISTORY)
        return [parse_record(PolicyEvent, entry.data, f"{HISTORY}:{entry.line}") for entry in content.entries]

    def find(self, to: str | None = None) -> tuple[PolicyEvent, bytes]:
        """A kept text: the one named `to`, or the one that was in place before this one.

        to: a version, the file's sha256, or the beginning of either. Raises PolicyError if it does not mean one text,
        or if the copy was altered.
        """
        event = self._before() if to is None else self._named(to)
        text = self._copy(event.sha256).read_bytes()
        if _digest(text) != event.sha256:
            raise PolicyError(f"the kept copy of {event.version} was altered; its sha256 is not {event.sha256}")
        return event, text

    def put(self, action: Literal["promote", "rollback"], text: bytes, version: str, by: str | None) -> None:
        """Put `text` into the file's place, atomically. Raises OSError, and PolicyError as `check_changeable` does."""
        self.check_changeable()
        self.folder.mkdir(exist_ok=True)
        with self._locked():
            before, events = self.read(), self.history()
            if before == text:
                return
            if not events or events[-1].sha256 != _digest(before):
                self._keep(before)
                self._record("found", _version(self.file), before, None)
            self._keep(text)
            with atomic_file(self.file) as tmp:
                tmp.write_bytes(text)
                tmp.chmod(self.file.stat().st_mode & 0o777)
            self._record(action, version, text, by)

    def _before(self) -> PolicyEvent:
        """What was in place before what is there now. Steps that were rolled back do not count."""
        current = _digest(self.read())
        steps: list[PolicyEvent] = []
        for event in self.history():
            known = [step.sha256 for step in steps]
            if event.action == "rollback" and event.sha256 in known:
                del steps[known.index(event.sha256) + 1 :]
            elif event.version and (not steps or steps[-1].sha256 != event.sha256):
                steps.append(event)
        if steps and steps[-1].sha256 == current:
            steps.pop()
        if not steps:
            raise PolicyError("no policy was in place before this one; name one with 'to'")
        return steps[-1]

    def _named(self, wanted: str) -> PolicyEvent:
        kept = {event.sha256: event for event in self.history() if event.version}
        exact = [event for event in kept.values() if wanted in (event.version, event.sha256)]
        found = exact or [e for e in kept.values() if e.version.startswith(wanted) or e.sha256.startswith(wanted)]
        if len(found) != 1:
            names = ", ".join(sorted(f"{event.version} ({event.sha256[:12]})" for event in found or kept.values()))
            which = f"could be {names}" if found else f"is none of {names or 'the kept ones: there are none'}"
            raise PolicyError(f"the version {wanted!r} {which}")
        return found[0]

    def _copy(self, digest: str) -> Path:
        return self.folder / f"{digest}.yaml"

    def _keep(self, text: bytes) -> None:
        copy = self._copy(_digest(text))
        if not copy.exists():
            with atomic_file(copy) as tmp:
                tmp.write_bytes(text)

    def _record(
        self, action: Literal["promote", "rollback", "found"], version: str, text: bytes, by: str | None
    ) -> None:
        moment = write_moment(datetime.now(UTC))
        event = PolicyEvent(action=action, version=version, sha256=_digest(text), by=by, time=moment)
        with hold(self.folder / HISTORY) as journal:
            journal.append([event.model_dump(exclude_none=True)])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A policy's text in a file of its own, under the name that messages give it."""

    file: Path
    name: str

    def use(self, build: Callable[[Path], T]) -> T:
        """What `build` makes of the file. Its PolicyError does not name a file that is gone when it is read."""
        try:
            return build(self.file)
        except PolicyError as error:
            raise PolicyError(str(error).replace(str(self.file), self.name)) from None


@contextmanager
def sent(text: bytes, file: Path | None) -> Iterator[Draft]:
    """A draft of a policy that was sent, for as long as the context is open. Blocks for as long as the disk does.

    file: the server's own policy, beside which the draft stands if it can. Raises PolicyError as `check_sent` does.
    """
    own = file if file is not None and file.is_file() else None
    with drafted(text, own) as place:
        draft = Draft(file=place, name="policy.yaml" if own is None else own.name)
        draft.use(check_sent)
        yield draft


@contextmanager
def drafted(text: bytes, file: Path | None) -> Iterator[Path]:
    """A file with a policy's text, for as long as the context is open.

    It stands beside `file`, so that `extends` means what it will mean there; without one, or where the folder cannot be
    written, in a folder of its own.
    """
    with _temporary(file) as draft:
        draft.write_bytes(text)
        yield draft


def check_sent(draft: Path) -> None:
    """Raise PolicyError for what a policy that was sent may not hold, wherever else it may.

    That is aliases, which make a short text mean a huge one, and other files than policies beside the server's own.
    """
    text = draft.read_bytes()
    try:
        aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        aliases = False  # the reader says better what is wrong
    if aliases:
        raise PolicyError("a policy that is sent may not hold YAML aliases (*name): write them out")
    extends = read_policy_text(draft).data.get("extends")
    if isinstance(extends, str) and extends not in shipped_policies():
        name = Path(extends)
        if name.name != extends or name.suffix not in (".yaml", ".yml") or extends.startswith("."):
            raise PolicyError(
                f"field 'extends': {extends[:100]!r} is neither a shipped policy's name nor a .yaml file beside the "
                "server's policy"
            )


def policy_files(path: Path) -> Sequence[Path]:
    """The file of a policy and those that it extends or would if they were there, as far as they can be read."""
    files = [path]
    while len(files) <= _DEPTH:
        try:
            extends = read_policy_text(files[-1]).data.get("extends")
        except SailguardError:
            break
        if not isinstance(extends, str) or (beside := files[-1].parent / extends) in files:
            break
        files.append(beside)
    return files


@contextmanager
def _temporary(file: Path | None) -> Iterator[Path]:
    if file is not None:
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
        except OSError:
            pass
        else:
            os.close(descriptor)
            try:
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)
            return
    with tempfile.TemporaryDirectory(prefix="sailguard-") as folder:
        yield Path(folder) / "policy.yaml"


def _version(file: Path) -> str:
    try:
        return Policy.load(file).version
    except SailguardError:
        return ""


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()

"""The keys file: one key a line, plain or hashed, with what its owner may do; read whole and written atomically.

A line is `KEY` (a plain key of a client), or `sha256:HEX ID ROLE [rate=600/minute] [concurrent=8]`. Empty lines and
lines that begin with `#` are skipped. No message of this module quotes a line: it may be a key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from service.errors import SettingsError
from service.limits import parse_rate

__all__ = ["KeyFile", "Principal", "Role", "StoredKey", "add_key", "hashed_line", "new_key", "plain_key", "remove_key"]

_HASHED = "sha256:"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID_RULE = "an id is 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or digit"
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_MOST_BYTES = 1024 * 1024
_MOST_CONCURRENT = 100_000


class Role(StrEnum):
    """What the owner of a key may do; `service.auth.permits` says what each role opens."""

    CLIENT = "client"
    READER = "reader"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who sent a request: `key_id` is what log and audit show; a limit that is none is the server's own."""

    key_id: str
    role: Role
    rate: str | None = None
    concurrent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A key's sha256 digest and its owner; `plain` says that the key itself stood where it was read."""

    digest: bytes
    principal: Principal
    plain: bool

    def __repr__(self) -> str:
        return f"StoredKey({self.principal.key_id!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFile:
    """A keys file as it was read. `lines` are its lines, with the key that stands on each."""

    lines: tuple[tuple[str, StoredKey | None], ...]
    signature: tuple[int, ...]
    mode: int

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Read `path`. Raises `SettingsError` that names the file and the line."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                content = file.read(_MOST_BYTES + 1)
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise _file_error(path, f"cannot read it: {error.strerror or type(error).__name__}") from error
        except UnicodeDecodeError:
            raise _file_error(path, "cannot read it: it is not UTF-8") from None
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _file_error(path, "others may write to it: chmod 600 it")
        if len(content) > _MOST_BYTES:
            raise _file_error(path, f"it is larger than {_MOST_BYTES} bytes")
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                lines.append((line, _parse(line.strip())))
            except ValueError as error:
                # The cause is dropped: its text may hold the line.
                raise _file_error(path, f"line {number}: {error}") from None
        found = cls(lines=tuple(lines), signature=signature_of(status), mode=stat.S_IMODE(status.st_mode))
        _refuse_twice(path, found.keys)
        return found

    @property
    def keys(self) -> tuple[StoredKey, ...]:
        """The keys, in the file's order."""
        return tuple(key for _, key in self.lines if key is not None)


def signature_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def plain_key(key: str, role: Role) -> StoredKey:
    """A key that is known itself. Raises `ValueError` if no `Authorization` header could carry it."""
    if not _KEY.fullmatch(key):
        raise ValueError("a plain key is 1 to 512 visible ASCII characters without spaces")
    digest = hashlib.sha256(key.encode()).digest()
    return StoredKey(digest=digest, principal=Principal(key_id=f"key-{digest.hex()[:8]}", role=role), plain=True)


def new_key() -> str:
    """A key that nobody can guess; a digest without salt is enough for it."""
    return f"sg-{secrets.token_urlsafe(32)}"


def hashed_line(key: str, principal: Principal) -> str:
    """The line that stands for `key` in a keys file. Raises `SettingsError` if it would not be read back."""
    if not _ID.fullmatch(principal.key_id):
        raise SettingsError(f"key {principal.key_id!r}: {_ID_RULE}")
    parts = [f"{_HASHED}{hashlib.sha256(key.encode()).hexdigest()}", principal.key_id, principal.role.value]
    if principal.rate is not None:
        parts.append(f"rate={''.join(principal.rate.split())}")
    if principal.concurrent is not None:
        parts.append(f"concurrent={principal.concurrent}")
    line = " ".join(parts)
    try:
        _parse(line)
    except ValueError as error:
        raise SettingsError(f"key {principal.key_id!r}: {error}") from None
    return line


def add_key(path: Path, line: str) -> None:
    """Append `line`, made by `hashed_line`; a new file is its owner's alone. Raises `SettingsError` if the id stands
    in the file already, or the file is not a keys file."""

    def append(old: KeyFile | None) -> Iterable[str]:
        added = _parse(line)
        assert added is not None
        if old is None:
            return [line]
        if any(key.principal.key_id == added.principal.key_id for key in old.keys):
            raise _file_error(path, f"it holds a key {added.principal.key_id!r} already: choose another --id")
        return [*(text for text, _ in old.lines), line]

    _rewrite(path, append)


def remove_key(path: Path, key_id: str) -> int:
    """Take the key `key_id` out and return how many keys are left. Raises `SettingsError` if there is none of it."""
    left = 0

    def filtered(old: KeyFile | None) -> Iterable[str]:
        nonlocal left
        kept = [(text, key) for text, key in (old.lines if old else ()) if not key or key.principal.key_id != key_id]
        if old is None or len(kept) == len(old.lines):
            raise _file_error(path, f"it holds no key {key_id!r}: see `sailguard keys list`")
        left = sum(key is not None for _, key in kept)
        return [text for text, _ in kept]

    _rewrite(path, filtered)
    return left


def _parse(line: str) -> StoredKey | None:
    if not line or line.startswith("#"):
        return None
    if not line.startswith(_HASHED):
        return plain_key(line, Role.CLIENT)
    first, *rest = line.split()
    digest = first.removeprefix(_HASHED)
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ValueError("after 'sha256:' there have to be 64 hexadecimal digits")
    if len(rest) < 2:
        raise ValueError("after the digest there have to be an id and a role")
    key_id, role, *options = rest
    if not _ID.fullmatch(key_id):
        raise ValueError(_ID_RULE)
    if role not in tuple(Role):
        raise ValueError(f"a role is one of {', '.join(Role)}")
    rate, concurrent = _limits(options)
    principal = Principal(key_id=key_id, role=Role(role), rate=rate, concurrent=concurrent)
    return StoredKey(digest=bytes.fromhex(digest), principal=principal, plain=False)


def _limits(options: list[str]) -> tuple[str | None, int | None]:
    given = dict(option.partition("=")[::2] for option in options)
    if len(given) != len(options) or not given.keys() <= {"rate", "concurrent"}:
        raise ValueError("after the role there may be rate=N/PERIOD and concurrent=N, each once")
    rate, concurrent = given.get("rate"), given.get("concurrent")
    if rate is not None:
        parse_rate(rate)
    if concurrent is None:
        return rate, None
    if not re.fullmatch("[0-9]{1,6}", concurrent) or not 1 <= int(concurrent) <= _MOST_CONCURRENT:
        raise ValueError(f"'concurrent' is a number from 1 to {_MOST_CONCURRENT}")
    return rate, int(concurrent)


def _refuse_twice(path: Path, keys: tuple[StoredKey, ...]) -> None:
    seen: dict[str, StoredKey] = {}
    for key in keys:
        other = seen.setdefault(key.principal.key_id, key)
        if other != key:
            raise _file_error(path, f"the id {key.principal.key_id!r} stands there twice")


def _rewrite(path: Path, change: Callable[[KeyFile | None], Iterable[str]]) -> None:
    """Replace the file in one step, under a lock that all writers of its folder take."""
    target = path.resolve()  # a link stays one
    with _locked(target.parent):
        old = KeyFile.read(target) if target.exists() else None
        text = "".join(f"{line}\n" for line in change(old))
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                if old is not None:
                    # A server that runs as another user has to be able to read the new file as it could the old one.
                    status = target.stat()
                    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(descriptor, status.st_uid, status.st_gid)
                    os.fchmod(descriptor, old.mode)
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_error(path: Path, problem: str) -> SettingsError:
    return SettingsError(f"keys file {str(path)!r}: {problem}")

"""Who may do what: the accepted keys, and the roles that open endpoints.

Keys are kept as sha256 digests and compared in constant time. A key that stands in the environment or plainly in the
file is known by `key-` and the first eight digits of its digest, a hashed one by the id on its line.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.requests import Request

from service.errors import SettingsError, admin_closed, admin_needed, forbidden
from service.key_file import KeyFile, Principal, Role, StoredKey, plain_key, signature_of

__all__ = [
    "ADMIN",
    "KEYLESS",
    "KeyRing",
    "Principal",
    "Role",
    "permits",
    "principal_of",
    "privileged",
    "require_admin",
    "require_privileged",
]

ADMIN = "/admin"
"""Whatever lies below is for administrators alone."""
KEYLESS = "sailguard.keyless"
"""Set in a request's scope by a server that has no keys at all."""

_READING = frozenset({"GET", "HEAD"})
_ALL = frozenset(Role)
_ROLES = {
    ADMIN: frozenset({Role.ADMIN}),
    # The stream shows the verdicts on everybody's requests.
    "/v1/events": frozenset({Role.ADMIN, Role.READER}),
    "/v1/about": _ALL,
    "/v1/features": _ALL,
    "/v1/models": _ALL,
    "/v1/stats": _ALL,
    "/metrics": _ALL,
}
_ELSEWHERE = frozenset({Role.ADMIN, Role.CLIENT})


def permits(role: Role, method: str, path: str) -> bool:
    """Whether `role` may send `method` to `path`; a reader may only read, and only what is listed above."""
    roles = next((roles for place, roles in _ROLES.items() if lies_in(path, place)), _ELSEWHERE)
    return role in roles and (role is not Role.READER or method in _READING)


def lies_in(path: str, place: str) -> bool:
    """Whether `path` is `place` or lies below it."""
    return path == place or path.startswith(f"{place}/")


def principal_of(request: Request) -> Principal | None:
    """Whose key `request` was sent with; none where the server has no keys, or the path needs none."""
    principal = request.scope.get("sailguard.principal")
    assert principal is None or isinstance(principal, Principal)
    return principal


def require_admin(request: Request) -> None:
    """Dependency of the admin routes, a second lock behind the path check. Raises `ApiError` (403)."""
    principal = principal_of(request)
    if principal is None:
        raise admin_closed()
    if principal.role is not Role.ADMIN:
        raise forbidden(principal.role)


def privileged(request: Request) -> bool:
    """Whether `request` may do what costs much or shows what is behind the policy: with an admin key, or on a server
    without keys, which only this machine reaches. Without a word on its keys it may not."""
    principal = principal_of(request)
    if principal is None:
        return request.scope.get(KEYLESS) is True
    return principal.role is Role.ADMIN


def require_privileged(request: Request) -> None:
    """Dependency of routes for which the path check is not enough. Raises `ApiError` (403)."""
    if not privileged(request):
        raise admin_needed()


class KeyRing:
    """The accepted keys. True if requests need one, which does not change while the server runs.

    `file` is a keys file, read at once and again by `refresh`. Raises `SettingsError` that names the setting or the
    file, never a key.
    """

    def __init__(self, clients: Iterable[str] = (), *, admins: Iterable[str] = (), file: Path | None = None) -> None:
        self._fixed = (*_plain("api_keys", clients, Role.CLIENT), *_plain("admin_keys", admins, Role.ADMIN))
        self._path = file
        self._seen: tuple[int, ...] | None = None
        self.warnings: tuple[str, ...] = ()
        """What is unsafe about the keys file, though it is used."""
        self._keys = self._merged(())
        if file is not None:
            found = KeyFile.read(file)
            if not found.keys:
                raise SettingsError(f"setting 'api_keys_file': {str(file)!r} holds no key: write one a line")
            self._take(found)
        self._guards = bool(self._keys)

    def __bool__(self) -> bool:
        return self._guards

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def has_admin(self) -> bool:
        """Whether there is a key that opens `/admin`."""
        return any(key.principal.role is Role.ADMIN for key in self._keys)

    def identify(self, key: bytes) -> Principal | None:
        """Whose key it is; none if it is not accepted. The time taken does not depend on how close it comes."""
        digest = hashlib.sha256(key).digest()
        found: Principal | None = None
        for known in self._keys:
            if hmac.compare_digest(digest, known.digest):
                found = known.principal
        return found

    def refresh(self) -> bool:
        """Read the keys file again if it has changed, and return whether the keys are other ones now.

        Costs one `stat` where nothing has changed. Raises `SettingsError` for a file that cannot be used, once for
        each version of it; the keys stay what they were. A file in which the last key was revoked is used.
        """
        if self._path is None:
            return False
        try:
            seen = signature_of(self._path.stat())
        except OSError:
            seen = ()
        if seen == self._seen:
            return False
        self._seen = seen
        before = self._keys
        self._take(KeyFile.read(self._path))
        return set(self._keys) != set(before)

    def _take(self, found: KeyFile) -> None:
        self._keys = self._merged(found.keys)
        self._seen = found.signature
        readable = found.mode & 0o004 and any(key.plain for key in found.keys)
        problem = f"keys file {str(self._path)!r} holds plain keys that every user of this machine can read: chmod 600"
        self.warnings = (problem,) if readable else ()

    def _merged(self, found: tuple[StoredKey, ...]) -> tuple[StoredKey, ...]:
        """All keys, each once. Raises `SettingsError` if one key has two owners, or one id two keys."""
        keys: dict[bytes, StoredKey] = {}
        owners: dict[str, bytes] = {}
        for key in (*self._fixed, *found):
            principal = keys.setdefault(key.digest, key).principal
            if principal != key.principal:
                raise SettingsError(f"the keys {principal.key_id!r} and {key.principal.key_id!r} are one: make another")
            if owners.setdefault(principal.key_id, key.digest) != key.digest:
                raise SettingsError(f"two keys have the id {principal.key_id!r}: rename one")
        return tuple(keys.values())


def _plain(setting: str, keys: Iterable[str], role: Role) -> Iterable[StoredKey]:
    for number, key in enumerate(keys, 1):
        try:
            yield plain_key(key, role)
        except ValueError as error:
            raise SettingsError(f"setting {setting!r}: key {number}: {error}") from None

"""The service's outer edge: which hosts and pages may speak to it, whose key a request bears, and the layers' order."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from service.auth import ADMIN, KEYLESS, lies_in, permits
from service.errors import (
    ApiError,
    admin_closed,
    error_response,
    forbidden,
    host_not_allowed,
    invalid_key,
    origin_not_allowed,
)
from service.limits import Limiter, Limits
from service.middleware import BodyLimit, RequestLog
from service.page_files import page_paths
from service.settings import is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI

    from guard.metrics import Metrics
    from service.auth import KeyRing, Principal
    from service.settings import Settings

__all__ = ["HostCheck", "KeyCheck", "install_middleware", "open_paths"]

_PROBES = frozenset({"/healthz", "/readyz"})
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)
_SHOWN_TO_PAGES = (
    "Retry-After",
    "X-Request-Id",
    "X-Sailguard-Action",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
)


def install_middleware(app: FastAPI, settings: Settings, metrics: Metrics, logger: Any, keys: KeyRing) -> Limiter:
    """Put all layers around `app` and return the limiter. From the outside: log, hosts, CORS, keys, limits, body.

    Raises `SettingsError` if the rates' store cannot be used.
    """
    for warning in keys.warnings:
        logger.warning(warning)
    unguarded = open_paths(settings)
    # The layer added last is the outermost.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.request_timeout)
    limiter = Limiter.of(settings, logger)
    app.add_middleware(Limits, limiter=limiter, open_paths=unguarded)
    app.add_middleware(KeyCheck, keys=keys, open_paths=unguarded)
    if settings.origins:
        from starlette.middleware.cors import CORSMiddleware

        # A browser's preflight bears no key, so it is answered before keys are asked for.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
            expose_headers=_SHOWN_TO_PAGES,
        )
    if not keys:
        app.add_middleware(HostCheck, names=settings.host_names, origins=settings.origins)
    app.add_middleware(RequestLog, metrics=metrics, logger=logger)
    return limiter


def open_paths(settings: Settings) -> frozenset[str]:
    """Paths that need no key and have no limit: the probes, the page's files, which hold no data, and the metrics of a
    server on loopback."""
    return _PROBES | page_paths() | ({"/metrics"} if is_loopback(settings.host) else set())


class HostCheck:
    """Refuses what a web page could send to a server without keys.

    Any page can make a browser send requests to 127.0.0.1, and one whose name has been pointed there could read the
    answers. Both give themselves away: the one by its `Origin`, the other by its `Host`.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._names = names
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        scope["sailguard.record"].refused = "host"
        await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        hosts = _values(scope, b"host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or not (is_loopback(match[1].lower()) or match[1].lower() in self._names):
            return host_not_allowed()
        own = f"{scope['scheme']}://{hosts[0]}".lower()
        if any(origin.lower() != own and origin not in self._origins for origin in _values(scope, b"origin")):
            return origin_not_allowed()
        return None


class KeyCheck:
    """Refuses requests without an accepted key, or with one of a role that may not do this, before their body is
    read. Without keys all may pass, but not to `/admin`."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = None
        scope[KEYLESS] = not self._keys
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        scope["sailguard.record"].refused = "auth"
        await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = _path(scope)
        principal = None
        if self._keys:
            principal = self._identify(scope)
            if principal is None:
                return invalid_key()
            scope["sailguard.principal"] = principal
            record = scope["sailguard.record"]
            record.principal, record.role = principal.key_id, principal.role.value
        if lies_in(path, ADMIN) and not self._keys.has_admin:
            return admin_closed()
        if principal is not None and not permits(principal.role, scope["method"], path):
            return forbidden(principal.role)
        return None

    def _identify(self, scope: Scope) -> Principal | None:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (found[0] if len(found) == 1 else b"").partition(b" ")
        return self._keys.identify(key.strip()) if scheme.lower() == b"bearer" else None


def _path(scope: Scope) -> str:
    """The path as the routes see it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

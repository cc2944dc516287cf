"""How much one sender may ask for: a rate over a moving window, and a number of requests open at a time.

A sender is a key, or an address where the server has no keys. Rates are counted in this process, or in a store that
several share. If that store fails, the process counts alone until it is back: a rate limit shares out capacity and
is no part of the guard, so a broken store must not stop the service.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import SettingsError, error_response, rate_limited, too_many_open

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.aio.storage import Storage

    from service.settings import Settings

__all__ = ["Limiter", "Limits", "Standing", "parse_rate"]

_MEMORY = "memory://"
_MOST_SENDERS = 10_000
_MOST_PER_WINDOW = 100_000
_LONGEST_WINDOW = 31 * 24 * 3600
_STORE_SECONDS = 0.5
_STORE_PAUSE = 5.0


def parse_rate(text: str) -> RateLimitItem:
    """Read a rate such as `600/minute` or `10/5 seconds`. Raises `ValueError` that says what is wrong."""
    from limits import parse_many

    try:
        found = parse_many(text) if len(text) <= 64 else []
    except ValueError:
        found = []
    if len(found) != 1:
        raise ValueError("a rate is a number and a period, such as 600/minute or 10/5seconds")
    rate = found[0]
    if not 1 <= rate.amount <= _MOST_PER_WINDOW or rate.multiples < 1 or rate.get_expiry() > _LONGEST_WINDOW:
        raise ValueError(f"a rate is 1 to {_MOST_PER_WINDOW} requests in at most 31 days")
    return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a sender stands after a request: `reset` is the time in seconds until one more request fits."""

    allowed: bool
    rate: str
    limit: int
    remaining: int
    reset: float


class Window:
    """The times of each sender's requests, in this process, for the `most` senders that were seen last.

    The memory store of the package `limits` starts a thread for each request and walks through all senders.
    """

    def __init__(self, *, most: int = _MOST_SENDERS, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._senders: OrderedDict[str, tuple[float, deque[float]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._senders)

    def hit(self, sender: str, rate: RateLimitItem) -> Standing:
        """Count one request of `sender`, if it fits; one that does not fit is not counted."""
        now, seconds = self._clock(), float(rate.get_expiry())
        _, times = self._senders.pop(sender, (seconds, deque[float]()))
        while times and times[0] <= now - seconds:
            times.popleft()
        allowed = len(times) < rate.amount
        if allowed:
            times.append(now)
        self._senders[sender] = (seconds, times)
        self._forget(now)
        return _standing(rate, allowed=allowed, remaining=rate.amount - len(times), reset=times[0] + seconds - now)

    def _forget(self, now: float) -> None:
        """Drop senders that were seen longest ago: those whose window is over, and those beyond the bound."""
        while self._senders:
            sender, (seconds, times) = next(iter(self._senders.items()))
            if len(self._senders) <= self._most and times[-1] > now - seconds:
                return
            del self._senders[sender]


class Limiter:
    """Counts senders' requests. One for each application; its methods belong to the event loop's thread.

    Raises `SettingsError` for a rate or a store that cannot be used.
    """

    def __init__(
        self,
        *,
        rate: str = "",
        concurrent: int = 0,
        store: Storage | None = None,
        logger: Any,
        window: Window | None = None,
    ) -> None:
        from limits.aio.strategies import MovingWindowRateLimiter

        self._rate = rate
        self._concurrent = concurrent
        self._rates: dict[str, RateLimitItem] = {}
        self._shared = None if store is None else MovingWindowRateLimiter(store)
        self._window = Window() if window is None else window
        self._logger = logger
        self._open: dict[str, int] = {}
        self._failed = False
        self._next_try = 0.0

    @classmethod
    def of(cls, settings: Settings, logger: Any) -> Limiter:
        """Return the limiter that `settings` ask for."""
        uri = settings.rate_storage
        store = None if uri.startswith(_MEMORY) else _store(uri)
        return cls(rate=settings.rate_limit, concurrent=settings.key_concurrent, store=store, logger=logger)

    @property
    def open(self) -> int:
        """Requests that are open, of all senders."""
        return sum(self._open.values())

    def enter(self, sender: str, most: int | None = None) -> int | None:
        """Open a request of `sender`; `leave` has to follow. Returns the limit if it is reached, and opens nothing."""
        cap = self._concurrent if most is None else most
        held = self._open.get(sender, 0)
        if cap and held >= cap:
            return cap
        self._open[sender] = held + 1
        return None

    def leave(self, sender: str) -> None:
        """End a request of `sender`."""
        left = self._open.pop(sender) - 1
        if left:
            self._open[sender] = left

    async def hit(self, sender: str, rate: str | None = None) -> Standing | None:
        """Count one request of `sender` against `rate`, or the server's own; none if there is no limit."""
        wanted = self._rate if rate is None else rate
        if not wanted:
            return None
        if wanted not in self._rates:
            self._rates[wanted] = parse_rate(wanted)
        item = self._rates[wanted]
        if self._shared is not None and time.monotonic() >= self._next_try:
            try:
                async with asyncio.timeout(_STORE_SECONDS):
                    standing = await self._hit_shared(self._shared, sender, item)
            except Exception as error:  # noqa: BLE001 - each kind of store has its own, and none may stop a request
                self._store_failed(error)
            else:
                self._store_works()
                return standing
        return self._window.hit(sender, item)

    async def _hit_shared(self, shared: Any, sender: str, item: RateLimitItem) -> Standing:
        allowed = await shared.hit(item, sender)
        stats = await shared.get_window_stats(item, sender)
        return _standing(item, allowed=allowed, remaining=stats.remaining, reset=stats.reset_time - time.time())

    def _store_failed(self, error: Exception) -> None:
        self._next_try = time.monotonic() + _STORE_PAUSE
        if not self._failed:
            # The message of the error may hold the store's URI, and so its password.
            self._logger.error("rate store failed: this process counts alone", error=type(error).__name__)
        self._failed = True

    def _store_works(self) -> None:
        if self._failed:
            self._logger.info("rate store works again")
        self._failed = False


class Limits:
    """Middleware: refuses with 429 what is over the sender's limits, before the body is read.

    A slot is held until the response has ended, however it ends.
    """

    def __init__(self, app: ASGIApp, *, limiter: Limiter, open_paths: Collection[str]) -> None:
        self._app = app
        self._limiter = limiter
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        principal, record = scope.get("sailguard.principal"), scope["sailguard.record"]
        sender = f"key:{principal.key_id}" if principal else f"address:{_address(scope)}"
        reached = self._limiter.enter(sender, principal.concurrent if principal else None)
        if reached is not None:
            record.refused = "concurrency"
            await error_response(too_many_open(reached))(scope, receive, send)
            return
        try:
            standing = await self._limiter.hit(sender, principal.rate if principal else None)
            if standing is None:
                await self._app(scope, receive, send)
                return
            with_headers = _announce(standing, send)
            if standing.allowed:
                await self._app(scope, receive, with_headers)
            else:
                record.refused = "rate"
                refusal = rate_limited(max(math.ceil(standing.reset), 1), standing.rate)
                await error_response(refusal)(scope, receive, with_headers)
        finally:
            self._limiter.leave(sender)


def _announce(standing: Standing, send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-ratelimit-limit-requests"] = str(standing.limit)
            headers["x-ratelimit-remaining-requests"] = str(standing.remaining)
            headers["x-ratelimit-reset-requests"] = duration(standing.reset)
        await send(message)

    return with_headers


def duration(seconds: float) -> str:
    """Write a time as OpenAI's headers do: `120ms`, `1s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _standing(rate: RateLimitItem, *, allowed: bool, remaining: int, reset: float) -> Standing:
    return Standing(
        allowed=allowed, rate=str(rate), limit=rate.amount, remaining=max(remaining, 0), reset=max(reset, 0.0)
    )


def _address(scope: Scope) -> str:
    """The sender's address; of IPv6 the network, since one machine may take any address in it."""
    client = scope.get("client")
    if not client:
        return "unknown"
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return str(client[0])[:64]
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _store(uri: str) -> Storage:
    """Open the store at `uri`. The message of the error leaves the URI out: it may hold a password."""
    from limits.aio.storage import Storage  # with it come the stores that can be named
    from limits.errors import ConfigurationError
    from limits.storage import storage_from_string

    scheme, found, _ = uri.removeprefix("async+").partition("://")
    scheme = scheme if found else "?"
    # Of the two clients for Redis this is the one that its makers keep.
    options = {"implementation": "redispy"} if scheme.startswith("redis") else {}
    try:
        store = storage_from_string(f"async+{uri.removeprefix('async+')}", **options)
    except (ConfigurationError, ValueError, ImportError):
        raise SettingsError(
            f"setting 'rate_storage': a store of the kind {scheme!r} cannot be used: it is memory, or one that the "
            "package limits knows, such as redis, with its client installed (pip install redis)"
        ) from None
    if not isinstance(store, Storage) or not hasattr(store, "get_moving_window"):
        raise SettingsError(f"setting 'rate_storage': a store of the kind {scheme!r} cannot count a moving window")
    return store

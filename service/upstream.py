"""The server behind the proxy: one client for all requests, and its answers with every size bounded.

Nothing of the request decides where it goes: the address is the operator's, redirects are not followed, and neither
proxies nor passwords are taken from the environment.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from service.errors import ApiError, SettingsError
from service.proxy_events import EventReader, LineTooLongError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx
    from starlette.datastructures import Headers

    from service.settings import Settings

__all__ = ["Reply", "Upstream", "broken", "parsed"]

_LARGEST_BODY = 16 * 1024 * 1024
_LARGEST_ERROR = 64 * 1024
_LARGEST_STREAM = 64 * 1024 * 1024
_LARGEST_EVENT = 1024 * 1024
_CONNECT_SECONDS = 5.0
_IDLE_SECONDS = 2.0

# Everything else in a request or an answer stays on its side of the proxy: hop-by-hop headers, cookies, encodings.
_REQUEST_HEADERS = ("openai-organization", "openai-project", "openai-beta", "idempotency-key", "user-agent")
_ANSWER_HEADERS = ("retry-after", "retry-after-ms", "openai-processing-ms", "openai-version")
_ANSWER_PREFIXES = ("x-ratelimit-",)


class Upstream:
    """The OpenAI-compatible server at `url`, such as http://127.0.0.1:8000/v1.

    key: sent as the bearer's; without one the client's own `Authorization` is passed on if `pass_keys`.
    connections: most that are open at a time. timeout: seconds without a byte after which a request has failed.
    Raises `SettingsError` for a URL that cannot be used, or without the package httpx.
    """

    def __init__(self, url: str, *, key: str = "", pass_keys: bool = False, connections: int, timeout: float) -> None:
        try:
            import httpx
        except ImportError as error:
            raise SettingsError("setting 'upstream': a proxy needs httpx: pip install 'sailguard[proxy]'") from error
        self._url = _checked(url)
        self._key = key
        self._pass_keys = pass_keys
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
            # Servers commonly close idle connections after 5 s; a request must not be sent into such an end.
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_IDLE_SECONDS
            ),
            verify=_trusted(),
            follow_redirects=False,
            trust_env=False,
        )

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The upstream that the settings name."""
        assert settings.upstream is not None
        return cls(
            settings.upstream,
            key=settings.upstream_key.get_secret_value(),
            pass_keys=not settings.key_ring(),
            # Lists of models are asked for beside the answers, for which there are so many places.
            connections=settings.max_concurrent + 2,
            timeout=settings.request_timeout,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    @asynccontextmanager
    async def ask(self, method: str, path: str, headers: Headers, body: object = None) -> AsyncIterator[Reply]:
        """Send a request; the reply can be read within this context, whose end closes it however much is unread.

        path: below the upstream's URL; what is special in it is escaped. headers: the client's.
        Raises `ApiError`: 502 if the upstream cannot be reached or breaks off, 504 if it is silent for too long.
        """
        content = None if body is None else json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        with _errors():
            request = self._client.build_request(
                method, f"{self._url}/{quote(path)}", content=content, headers=self._headers(headers, content)
            )
            response = await self._client.send(request, stream=True)
        try:
            yield Reply(response, own_key=bool(self._key))
        finally:
            await response.aclose()

    def _headers(self, client: Headers, content: bytes | None) -> dict[str, str]:
        headers = {name: client[name] for name in _REQUEST_HEADERS if name in client}
        headers |= {"accept": "application/json, text/event-stream", "accept-encoding": "identity"}
        if content is not None:
            headers["content-type"] = "application/json"
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        elif self._pass_keys and "authorization" in client:
            headers["authorization"] = client["authorization"]
        return headers


class Reply:
    """What the upstream answers. Reading it raises `ApiError` as `Upstream.ask` does."""

    def __init__(self, response: httpx.Response, *, own_key: bool) -> None:
        self._response = response
        self._own_key = own_key

    @property
    def streams(self) -> bool:
        """Whether it consists of server-sent events."""
        return self._type == "text/event-stream"

    @property
    def headers(self) -> dict[str, str]:
        """Those of its headers that the client gets, too."""
        return {
            name: value
            for name, value in self._response.headers.items()
            if name in _ANSWER_HEADERS or name.startswith(_ANSWER_PREFIXES)
        }

    async def check(self) -> None:
        """Raise `UpstreamRefusal`, or `ApiError`, unless the upstream has answered the request."""
        status = self._response.status_code
        if status == 200:
            return
        if status < 400:
            raise broken(f"it answered with status {status}, which is neither an answer nor an error")
        if status in (401, 403) and self._own_key:
            # Not the client's mistake, and the message may quote the key.
            raise broken("it refuses the key that this server has for it: see the setting upstream_key")
        raise UpstreamRefusal(status, await self._error(), self.headers)

    async def json(self) -> Any:
        """Its body."""
        if self._type != "application/json":
            raise broken("its answer is not JSON")
        return parsed(await self._body(_LARGEST_BODY))

    async def close(self) -> None:
        """Hang up, however much is unread."""
        await self._response.aclose()

    async def events(self) -> AsyncGenerator[str]:
        """The data of its events, as they come."""
        reader, size = EventReader(_LARGEST_EVENT), 0
        with _errors():
            chunks: Any = self._response.aiter_bytes()
            async with aclosing(chunks) as pieces:
                async for piece in pieces:
                    size += len(piece)
                    if size > _LARGEST_STREAM:
                        raise broken(f"its stream is longer than {_LARGEST_STREAM} bytes")
                    for event in _completed(reader, piece):
                        yield event
        last = reader.end()
        if last is not None:
            yield last

    @property
    def _type(self) -> str:
        return str(self._response.headers.get("content-type", "")).partition(";")[0].strip().lower()

    async def _body(self, limit: int) -> bytes:
        pieces, size = [], 0
        with _errors():
            async for piece in self._response.aiter_bytes():
                size += len(piece)
                if size > limit:
                    raise broken(f"its answer is longer than {limit} bytes")
                pieces.append(piece)
        return b"".join(pieces)

    async def _error(self) -> dict[str, Any]:
        """The upstream's own error if it has OpenAI's shape, or at least is JSON; else one that says the status."""
        status = self._response.status_code
        try:
            body = parsed(await self._body(_LARGEST_ERROR))
        except ApiError:
            body = None
        if isinstance(body, dict) and body:
            return body
        message = f"The upstream server answered with status {status}."
        return ApiError(status, message, kind="upstream_error", code="upstream_error").body()


class UpstreamRefusal(ApiError):  # noqa: N818 - it is the upstream's refusal, passed on
    """The upstream's error with its status and its body."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(status, "The upstream server refused the request.", headers=headers)
        self._body = body

    def body(self) -> dict[str, Any]:
        """What the upstream said."""
        return self._body


def broken(problem: str) -> ApiError:
    """502 for an upstream that does not answer as it should."""
    return ApiError(502, f"The upstream server failed: {problem}.", kind="upstream_error", code="upstream_error")


def _completed(reader: EventReader, piece: bytes) -> list[str]:
    try:
        return reader.feed(piece)
    except LineTooLongError as error:
        raise broken(str(error)) from None


def parsed(text: bytes | str) -> Any:
    """What the upstream says in JSON. NaN and the infinities, which are none, become null."""
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise broken("its answer is not valid JSON") from None


@contextmanager
def _errors() -> Iterator[None]:
    """Turn httpx' errors into the API's. Their texts may name addresses and are left out."""
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        message = "The upstream server did not answer in time."
        raise ApiError(504, message, kind="upstream_error", code="upstream_timeout") from error
    except httpx.ConnectError as error:
        message = "The upstream server cannot be reached."
        raise ApiError(502, message, kind="upstream_error", code="upstream_unreachable") from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise broken("the connection broke off, or what came over it is not HTTP") from error


def _trusted() -> ssl.SSLContext | bool:
    """Whose certificates are believed: the usual ones, or those of the file that SSL_CERT_FILE names."""
    return ssl.create_default_context() if os.environ.get("SSL_CERT_FILE") else True


def _checked(url: str) -> str:
    """The URL without a slash at its end. Raises `SettingsError` unless it names a server and a path, no more."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise SettingsError(f"setting 'upstream': {url!r} is not a URL such as http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise SettingsError("setting 'upstream': a URL must hold no password: put the key into 'upstream_key'")
    return url.rstrip("/")

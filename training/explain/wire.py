"""One call to a chat endpoint over HTTP: what may be sent where, and what the answer's status and body mean."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from feature_bank.errors import MissingExtraError
from training.explain.answers import clean_text
from training.explain.replies import is_count
from training.explain.spending import EndpointError

if TYPE_CHECKING:
    import httpx

MAX_BODY_BYTES = 8 * 1024 * 1024
_PATH = "/chat/completions"
_TRANSIENT = frozenset({408, 409, 425, 429})
_REFUSED = frozenset({400, 413, 422})
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


class NoAnswerError(Exception):
    """A call brought no answer, but another attempt may. `sent`: the server may have worked on it."""

    def __init__(self, message: str, *, sent: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.sent = sent
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: the status, the body and the header by which a server asks for patience."""

    status: int
    body: bytes
    retry_after: str | None = None
    location: str | None = None


class Completion(NamedTuple):
    """The text of an answer, and the tokens that the server says it took, if it does."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


def check_url(base_url: str) -> str:
    """The address that requests go to. Raises `EndpointError` for anything but a plain http or https URL."""
    shown = clean_text(base_url, limit=100)
    try:
        parts = urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise EndpointError(f"endpoint {shown!r} is no URL: {error}") from None
    if "@" in parts.netloc:
        raise EndpointError("the endpoint's URL holds a user name or a key: name an environment variable for the key")
    if parts.scheme not in ("http", "https") or not host:
        raise EndpointError(f"endpoint {shown!r}: give an address such as http://127.0.0.1:8801/v1")
    if parts.query or parts.fragment or not base_url.isascii() or re.search(r"\s|[\x00-\x1f\x7f]", base_url.strip()):
        raise EndpointError(f"endpoint {shown!r}: give the address alone, without a query, a fragment or blanks")
    path = parts.path.rstrip("/").removesuffix(_PATH) + _PATH
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def read_key(variable: str | None) -> str | None:
    """The API key that an environment variable holds. Raises `EndpointError`, in which no value is shown."""
    if variable is None:
        return None
    if not _VARIABLE.fullmatch(variable):
        raise EndpointError("the API key is given by the name of an environment variable, in capitals, not by itself")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(f"environment variable {variable} is not set: it must hold the endpoint's API key")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise EndpointError(f"environment variable {variable} holds blanks or signs that no API key has")
    return key


def connect(url: str, *, timeout: float, workers: int) -> httpx.Client:
    """A client for one endpoint. Redirects are not followed, and no proxy stands before this machine's own servers."""
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("an endpoint needs httpx: pip install 'sailguard[train]'") from error
    return httpx.Client(
        verify=url.startswith("https:"),  # loading certificates takes long, and plain http has no use for them
        timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
        follow_redirects=False,
        trust_env=not _is_loopback(urlsplit(url).hostname or ""),
        limits=httpx.Limits(max_connections=workers),
    )


def post(client: httpx.Client, url: str, body: dict[str, Any], *, key: str | None, timeout: float) -> Answer:
    """Send one request and read its answer, within `timeout` seconds in all and a bounded size.

    Raises `NoAnswerError` if there is none.
    """
    import httpx

    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    deadline = time.monotonic() + timeout
    received = bytearray()
    try:
        with client.stream("POST", url, content=json.dumps(body).encode("ascii"), headers=headers) as response:
            # The client's own timeout is for each read: an answer that trickles would never end.
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) > MAX_BODY_BYTES:
                    raise NoAnswerError(f"the answer has more than {MAX_BODY_BYTES} bytes", sent=True)
                if time.monotonic() > deadline:
                    raise NoAnswerError(f"no complete answer within {timeout:g} s", sent=True)
            return Answer(
                status=response.status_code,
                body=bytes(received),
                retry_after=response.headers.get("Retry-After"),
                location=response.headers.get("Location"),
            )
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise NoAnswerError(f"cannot connect: {clean_text(str(error), limit=200)}", sent=False) from None
    except httpx.TimeoutException:
        raise NoAnswerError(f"no answer within {timeout:g} s", sent=True) from None
    except httpx.RequestError as error:
        raise NoAnswerError(f"the connection broke: {clean_text(str(error), limit=200)}", sent=True) from None


def read_completion(answer: Answer, key: str | None) -> Completion:
    """The text of an answer of status 200. Raises `NoAnswerError` if it is no chat completion, whole and well-formed.

    A choice without text (a refusal, say) is an answer, of no text.
    """
    try:
        found = json.loads(answer.body)
        message = found["choices"][0]["message"]
        text = message.get("content")
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        shown = _shown(answer.body.decode("utf-8", "replace"), key, limit=80) or "it is empty"
        raise NoAnswerError(f"the answer is no chat completion: {shown}", sent=True) from None
    usage = found.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    prompt, completion = counts if len(counts) == 2 and all(map(is_count, counts)) else (None, None)
    return Completion(text if isinstance(text, str) else "", prompt, completion)


def judge(answer: Answer, key: str | None) -> str:
    """What the server says about a request that it refuses for what the request is.

    For any other status than 200, raises `NoAnswerError` if patience may help and `EndpointError` if it cannot.
    """
    status, message = answer.status, server_message(answer, key)
    if status in _REFUSED:
        return message
    if status in _TRANSIENT or status >= 500:
        said = f": {message}" if message else ""
        raise NoAnswerError(f"status {status}{said}", sent=False, retry_after=wait_asked(answer.retry_after))
    remedy = {
        401: "check the API key and the variable that holds it",
        403: "check the API key and the variable that holds it",
        404: "check the model's name and the address, which mostly ends in /v1",
        405: "check the address, which mostly ends in /v1",
    }.get(status, "check the address")
    if 300 <= status < 400:
        remedy = f"redirects are not followed; it points to {clean_text(answer.location or 'nowhere', limit=200)}"
    raise EndpointError(f"the endpoint answers with status {status} ({message or 'no message'}): {remedy}")


def server_message(answer: Answer, key: str | None) -> str:
    """A server's own words on an error, cleaned, cut, and without the key should they repeat it."""
    text: Any = answer.body.decode("utf-8", "replace")
    try:
        found = json.loads(answer.body)
        error = found.get("error") or found.get("detail") or found.get("message")
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, RecursionError, AttributeError):
        pass  # no JSON, or none of a known form: the body itself is what there is
    return _shown(str(text or ""), key, limit=300)


def wait_asked(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None if it does not say."""
    if header is None:
        return None
    try:
        return max(0.0, float(header)) if re.fullmatch(r"[0-9.]{1,12}", header.strip()) else _until(header)
    except (ValueError, OverflowError):
        return None


def _until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _shown(text: str, key: str | None, *, limit: int) -> str:
    return clean_text(text.replace(key, "***") if key else text, limit=limit)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""A language model behind any OpenAI-compatible `/chat/completions` endpoint, with caps, retries and a cache.

The endpoint is not trusted: its answers are bounded in time and size, a redirect is not followed, and what it says is
cleaned before it is shown. The API key is read from the environment and stands in no file, message or log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from training.explain.replies import TEMPERATURE, ChatReply, ChatRequest, ReplyCache, estimate_tokens
from training.explain.spending import EndpointError, Meter, Pace, Usage
from training.explain.wire import Answer, NoAnswerError, check_url, connect, judge, post, read_completion, read_key

if TYPE_CHECKING:
    import httpx

BACKOFF_CEILING = 60.0
"""Longest wait in seconds before a request is sent again, whatever the server asks for."""
_HOPELESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a set of requests would cost, without sending any."""

    calls: int
    cached: int
    """Requests that are answered already and cost nothing."""
    prompt_tokens: int
    max_completion_tokens: int
    """If every answer were as long as it may be."""


class ChatEndpoint:
    """Asks one model questions at temperature 0, each at most once.

    base_url: `http(s)://HOST[:PORT]/v1`, with or without `/chat/completions` at its end.
    api_key_env: name of the environment variable that holds the key; None sends no key.
    cache: folder of the replies. What stands there is never asked for again, whatever the URL.
    max_calls, max_tokens: caps on what this object sends; None is no cap. Failed calls count.
    timeout: seconds for one call, its answer included.
    retries: attempts after the first, for 429, 5xx, timeouts, broken connections and answers that are no chat
    completion; the waits between them double from `backoff` seconds, or are what the server asks for, up to a ceiling.
    workers: requests under way at once. The replies do not depend on it.
    per_minute: calls begun within any minute, those that fail included; None is no limit.

    Raises `EndpointError` for a URL or a key that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path,
        api_key_env: str | None = None,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 1.0,
        workers: int = 1,
        per_minute: int | None = None,
    ) -> None:
        self.url = check_url(base_url)
        self.model = model
        self.cache = ReplyCache(cache)
        self.offline = False
        """Answer from the cache alone; what is not there is `not_asked`."""
        self._key = read_key(api_key_env)
        self._meter = Meter(max_calls=max_calls, max_tokens=max_tokens)
        self._pace = Pace(per_minute)
        self._timeout, self._retries, self._backoff, self._workers = timeout, retries, backoff, workers
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._json_mode: bool | None = None  # None: whether the server takes response_format is not known yet
        self._limit_name = "max_tokens"
        self._answered = 0
        self._refused = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def usage(self) -> Usage:
        """What this object sent, and what it cost. Replies from the cache cost nothing."""
        return self._meter.usage

    @property
    def workers(self) -> int:
        """Requests under way at once, at most."""
        return self._workers

    @property
    def understood(self) -> bool:
        """Whether it is known in which form the server takes requests."""
        return self._json_mode is not None

    def stop(self) -> None:
        """Answer from the cache alone from now on; what waits to be sent again is given up. Safe from any thread."""
        with self._lock:
            self.offline = True
            self._stopped.set()

    def reply(self, request: ChatRequest) -> ChatReply:
        """Put one question, for a caller that keeps to `workers` by itself. Safe from several threads.

        Raises `EndpointError` as it comes, without a word on what is kept.
        """
        return self._reply(request.key(self.model), request)

    def ask(self, request: ChatRequest) -> ChatReply:
        """Put one question. See `ask_all`."""
        return self.ask_all([request])[0]

    def ask_all(
        self, requests: Sequence[ChatRequest], *, report: Callable[[int, int], None] | None = None
    ) -> list[ChatReply]:
        """The replies, in the order of the requests; `report(done, total)` is called after each.

        A request that the server refuses for what it is (too long, filtered) has a reply without text. Raises
        `EndpointError` if a cap is reached or the server is gone: all that was answered is in the cache by then, and
        the same call goes on from there.
        """
        self._stopped.clear()
        keys = [request.key(self.model) for request in requests]
        pending = dict(zip(keys, requests, strict=True))
        found: dict[str, ChatReply] = {}

        def done(key: str, reply: ChatReply) -> None:
            found[key] = reply
            if report is not None:
                report(len(found), len(pending))

        try:
            self._run(pending, done)
        except EndpointError as error:
            kept = sum(reply.status == "answered" for reply in found.values())
            raise type(error)(
                f"{error}. {kept} of {len(pending)} requests of this step are answered and kept in "
                f"{self.cache.folder}: run the same command again to go on, nothing is paid for twice"
            ) from error
        return [found[key] for key in keys]

    def estimate(self, requests: Sequence[ChatRequest]) -> Estimate:
        """What `ask_all` would cost if no call failed. Nothing is sent."""
        distinct = {request.key(self.model): request for request in requests}
        new = [request for key, request in distinct.items() if self.cache.load(key) is None]
        return Estimate(
            calls=len(new),
            cached=len(distinct) - len(new),
            prompt_tokens=sum(request.prompt_tokens() for request in new),
            max_completion_tokens=sum(request.max_answer for request in new),
        )

    def _run(self, pending: Mapping[str, ChatRequest], done: Callable[[str, ChatReply], None]) -> None:
        items = iter(pending.items())
        for key, request in items:
            done(key, self._reply(key, request))
            # What the server accepts is found out by one call, not by several at once.
            if self._workers > 1 and self._json_mode is not None:
                self._run_together(dict(items), done)

    def _run_together(self, pending: Mapping[str, ChatRequest], done: Callable[[str, ChatReply], None]) -> None:
        futures: dict[Future[ChatReply], str] = {}
        with ThreadPoolExecutor(self._workers, thread_name_prefix="endpoint") as pool:
            try:
                for key, request in pending.items():
                    futures[pool.submit(self._reply, key, request)] = key
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)  # what is under way is paid for, so it is waited for and kept
                for future, key in futures.items():
                    if not future.cancelled() and future.exception() is None:
                        done(key, future.result())
                raise

    def _reply(self, key: str, request: ChatRequest) -> ChatReply:
        """One reply, from the cache or from the server, which is asked again as long as there is hope."""
        if (kept := self.cache.load(key)) is not None:
            self._count(answered=1)
            return kept
        attempt = 0
        while not (self.offline or self._stopped.is_set()):
            attempt += 1
            try:
                reply = self._send(request)
            except NoAnswerError as error:
                if attempt > self._retries:
                    raise EndpointError(f"{self.url}: {error} (asked {attempt} times)") from error
                pause = self._backoff * 2 ** (attempt - 1) if error.retry_after is None else error.retry_after
                self._stopped.wait(min(pause, BACKOFF_CEILING))
                continue
            if reply.status == "answered":
                self.cache.save(key, reply, self.model)
                self._count(answered=1)
            return reply
        return ChatReply(status="not_asked")

    def _send(self, request: ChatRequest) -> ChatReply:
        """Send a request in the form that the server accepts, which may take another call to find out."""
        json_mode = self._json_mode is not False
        while True:
            limit_name = self._limit_name
            body: dict[str, Any] = {
                "model": self.model,
                "messages": request.payload(),
                "temperature": TEMPERATURE,
                limit_name: request.max_answer,
            }
            if json_mode:
                body["response_format"] = {"type": "json_object"}
            reply = self._call(request, body)
            if isinstance(reply, ChatReply):
                if self._json_mode is None:
                    self._json_mode = json_mode
                return reply
            if limit_name == "max_tokens" and "max_completion_tokens" in reply:
                self._limit_name = "max_completion_tokens"
            elif json_mode and (self._json_mode is None or "response_format" in reply):
                json_mode = False
            else:
                self._count(refused=1)
                if not self._answered and self._refused >= _HOPELESS:
                    raise EndpointError(f"{self.url} refuses every request: {reply or 'without a word'}")
                return ChatReply(status="refused")

    def _call(self, request: ChatRequest, body: dict[str, Any]) -> ChatReply | str:
        """One call, counted: the reply, or why the request is refused. Raises what `judge` and `post` raise."""
        prompt = request.prompt_tokens()
        reserved = prompt + request.max_answer
        client = self._connect()
        self._meter.reserve(reserved)
        if not self._pace.wait(self._stopped):
            self._meter.release(reserved)
            raise NoAnswerError("all was stopped", sent=False)
        # A call that went out and has no usable answer may have been worked on: it counts for all that it might cost.
        spent = ChatReply(status="refused", prompt_tokens=prompt, completion_tokens=request.max_answer, estimated=True)
        try:
            answer = post(client, self.url, body, key=self._key, timeout=self._timeout)
            if answer.status == 200:
                spent = _read(answer, prompt, self._key)
                return spent
            spent = ChatReply(status="refused")
        except NoAnswerError as error:
            if not error.sent:
                spent = ChatReply(status="refused")
            raise
        finally:
            self._meter.settle(
                reserved, prompt=spent.prompt_tokens, completion=spent.completion_tokens, estimated=spent.estimated
            )
        return judge(answer, self._key)

    def _connect(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = connect(self.url, timeout=self._timeout, workers=self._workers)
            return self._client

    def _count(self, *, answered: int = 0, refused: int = 0) -> None:
        with self._lock:
            self._answered += answered
            self._refused += refused


def _read(answer: Answer, prompt_tokens: int, key: str | None) -> ChatReply:
    """The reply that an answer of status 200 holds; tokens that it does not name are estimated."""
    text, prompt, completion = read_completion(answer, key)
    named = prompt is not None and completion is not None
    return ChatReply(
        status="answered",
        text=text,
        prompt_tokens=prompt if prompt is not None else prompt_tokens,
        completion_tokens=completion if completion is not None else estimate_tokens(text),
        estimated=not named,
    )

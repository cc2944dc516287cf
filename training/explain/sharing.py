"""One endpoint for many callers at once, with one cap for all of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from training.explain.endpoint import ChatEndpoint
from training.explain.replies import ChatReply, ChatRequest
from training.explain.spending import EndpointError


class SharedEndpoint:
    """Puts the questions of all callers through one endpoint, so that its caps hold for all of them together.

    A question that is on its way for one caller is not sent again for another. Once a cap is reached or the server is
    gone, what is not in the cache is `not_asked`, whoever wants it, and `failure` says why. Use it as a context: what
    is under way when that ends is paid for, so it is waited for and kept.
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self._endpoint = endpoint
        self._pool = ThreadPoolExecutor(endpoint.workers, thread_name_prefix="endpoint")
        self._lock = threading.Lock()
        self._first = threading.Lock()
        self._asked: dict[str, Future[ChatReply]] = {}
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._endpoint.stop()
        self._pool.shutdown(cancel_futures=True)
        self._endpoint.offline = False

    @property
    def failure(self) -> Exception | None:
        """What ended the asking, if anything did: an `EndpointError`, or what went wrong in keeping an answer."""
        failure = self._failure
        if not isinstance(failure, EndpointError):
            return failure
        found = type(failure)(
            f"{failure}. What was answered is kept in {self._endpoint.cache.folder}: run the same command again to go "
            "on, nothing is paid for twice"
        )
        found.__cause__ = failure
        return found

    def submit(self, requests: Sequence[ChatRequest]) -> Future[list[ChatReply]]:
        """The replies to come, in the order of the requests. Returns at once; what comes may be cancelled only."""
        together: Future[list[ChatReply]] = Future()
        replies = [self._one(request) for request in requests]
        waiting = len(replies)
        if not waiting:
            together.set_result([])

        def done(_: Future[ChatReply]) -> None:
            nonlocal waiting
            with self._lock:
                waiting -= 1
                if waiting:
                    return
            if any(reply.cancelled() for reply in replies):
                together.cancel()
            else:
                together.set_result([reply.result() for reply in replies])

        for reply in replies:
            reply.add_done_callback(done)
        return together

    def _one(self, request: ChatRequest) -> Future[ChatReply]:
        key = request.key(self._endpoint.model)
        with self._lock:
            if (asked := self._asked.get(key)) is not None:
                return asked
            future = self._asked[key] = self._pool.submit(self._reply, request)

        def done(found: Future[ChatReply]) -> None:
            # An answer is in the cache by now; a refusal is in none, and not to be asked for again
            if found.cancelled() or found.result().status != "refused":
                with self._lock:
                    self._asked.pop(key, None)

        future.add_done_callback(done)
        return future

    def _reply(self, request: ChatRequest) -> ChatReply:
        # What the server accepts, and whether it does, is found out by one call, not by several at once
        with self._first:
            if not self._endpoint.understood:
                return self._put(request)
        return self._put(request)

    def _put(self, request: ChatRequest) -> ChatReply:
        try:
            return self._endpoint.reply(request)
        except Exception as error:  # noqa: BLE001  # one question's is everybody's: the caller is told by `failure`
            with self._lock:
                self._failure = self._failure or error
            self._endpoint.stop()
            return ChatReply(status="not_asked")
